"""For people who work on bnfold: benchmarks against the other tools, sweeps over real models."""
