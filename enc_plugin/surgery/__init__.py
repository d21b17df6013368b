"""What conversion, folding and audit do to a network, and how they see what the network does."""
