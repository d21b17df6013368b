"""Tables, figures and HTML pages about training runs and checkpoints."""
