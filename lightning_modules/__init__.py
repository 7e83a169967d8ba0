"""Training: LightningModules, callbacks and the command line that wires the other packages together."""
