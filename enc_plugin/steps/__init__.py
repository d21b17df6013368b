"""What the shift and the projection share: groups, the kinds of steps of optimizers, hooks that stay with copies."""
