"""The four networks on megatron-core: encoder (and its EMA reference), predictor, decoder.

Every constructor takes its process groups; nothing here reads a global group.
"""
