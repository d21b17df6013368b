"""How ATen operations respond to a positive factor of their inputs, by operation name."""

from __future__ import annotations

# Operations that move elements without changing them. Applied to labels, they move the labels in the same way.
MOVES = {
    *("view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand"),
    *("select", "slice", "split", "split_with_sizes", "unbind", "cat", "stack", "flip", "roll", "repeat"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "constant_pad_nd"),
}
# Operations with f(s x) = s f(x) for s > 0. ELEMENTWISE: for a different s for each element.
ELEMENTWISE = {"relu", "leaky_relu", "_prelu_kernel", "native_dropout", "abs", "neg"}
ELEMENTWISE |= {"clone", "detach", "alias", "_to_copy", "lift_fresh"}
# POOLS: for an s for each channel (max pooling pads with -inf, average pooling with zeros or not at all).
POOLS = {
    *(f"{kind}_pool{d}d{end}" for kind in ("max", "avg") for d in (1, 2, 3) for end in ("", "_with_indices")),
    *(f"{start}adaptive_{kind}_pool{d}d" for start in ("", "_") for kind in ("max", "avg") for d in (1, 2, 3)),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
}
# REDUCTIONS: for an s that is equal along the reduced dimensions.
REDUCTIONS = {"mean", "sum", "amax", "amin"}
# HOMOGENEOUS: for one s of the whole tensor.
HOMOGENEOUS = MOVES | ELEMENTWISE | POOLS | REDUCTIONS
HOMOGENEOUS |= {"max", "min", "cumsum", "index", "linalg_vector_norm", "std"}
# Products with a weight, and the position of the bias among the arguments (None: there is no bias).
WEIGHTED = {"convolution": 2, "addmm": 0, "baddbmm": 0, "addmv": 0, "mm": None, "bmm": None, "mv": None, "dot": None}
NORMS = ("batch_norm", "native_layer_norm", "native_group_norm", "rms_norm", "local_response_norm")
TINY = 1e-2  # a constant up to this size counts as the eps of a denominator
