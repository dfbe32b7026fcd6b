"""What kind of work each dispatched operation is, for the op list that the cost models read."""

from __future__ import annotations

from edgeprune.graph import moves, norms, places  # noqa: F401  they register their rules
from edgeprune.graph.rules import RULES

KINDS = {
    **dict.fromkeys("convolution _convolution mkldnn_convolution cudnn_convolution".split(), "conv"),
    **dict.fromkeys("addmm mm bmm baddbmm".split(), "linear"),
    **dict.fromkeys(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm native_layer_norm "
        "native_group_norm _fused_rms_norm".split(),
        "norm",
    ),
    **dict.fromkeys(
        "relu relu6 hardtanh hardswish hardsigmoid sigmoid silu gelu elu celu selu leaky_relu _prelu_kernel mish softplus tanh clamp "
        "clamp_min clamp_max glu".split(),
        "activation",
    ),
    **dict.fromkeys("add sub rsub".split(), "add"),
    **dict.fromkeys("mul div".split(), "mul"),
    **dict.fromkeys(
        "max_pool2d_with_indices max_pool2d max_pool1d max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
        "adaptive_avg_pool1d _adaptive_avg_pool3d adaptive_max_pool2d mean sum amax".split(),
        "pool",
    ),
    **dict.fromkeys(["cat", "stack"], "cat"),
    **dict.fromkeys([n for n in RULES if n.startswith(("upsample", "_upsample"))], "resize"),
    **dict.fromkeys(
        "clone detach alias _to_copy lift_fresh permute transpose t unsqueeze squeeze expand flip repeat view _unsafe_view reshape "
        "_reshape_alias split split_with_sizes unbind slice select roll constant_pad_nd pixel_shuffle channel_shuffle "
        "native_channel_shuffle".split(),
        "move",
    ),
}
