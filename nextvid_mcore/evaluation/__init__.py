"""Looking at what a run has learnt."""
