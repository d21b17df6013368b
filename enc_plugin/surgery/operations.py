"""What ATen operations do with a positive factor of their inputs, by the operations' names."""

from __future__ import annotations

# Operations that move elements and change none. The same operation moves the labels of the elements.
MOVES = {
    *("view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand"),
    *("select", "slice", "split", "split_with_sizes", "unbind", "cat", "stack", "flip", "roll", "repeat"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "constant_pad_nd"),
}
# For a factor s > 0: f(s x) = s f(x), element by element;
ELEMENTWISE = {"relu", "leaky_relu", "_prelu_kernel", "native_dropout", "abs", "neg"}
ELEMENTWISE |= {"clone", "detach", "alias", "_to_copy", "lift_fresh"}
# for all positions of a channel together (max pooling pads with -inf, average pooling with zeros or not at all);
POOLS = {
    *(f"{kind}_pool{d}d{end}" for kind in ("max", "avg") for d in (1, 2, 3) for end in ("", "_with_indices")),
    *(f"{start}adaptive_{kind}_pool{d}d" for start in ("", "_") for kind in ("max", "avg") for d in (1, 2, 3)),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
}
REDUCTIONS = {"mean", "sum", "amax", "amin"}  # and over whole dimensions.
HOMOGENEOUS = MOVES | ELEMENTWISE | POOLS | REDUCTIONS
HOMOGENEOUS |= {"max", "min", "cumsum", "index", "linalg_vector_norm", "std"}
WEIGHTED = {"convolution": 2, "addmm": 0, "baddbmm": 0, "addmv": 0, "mm": None, "bmm": None, "mv": None, "dot": None}
NORMS = ("batch_norm", "native_layer_norm", "native_group_norm", "rms_norm", "local_response_norm")
TINY = 1e-2  # an eps that keeps a denominator from zero; not a part of the signal
