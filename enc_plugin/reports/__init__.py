"""Tables, figures and pages that are made of runs and checkpoints."""
