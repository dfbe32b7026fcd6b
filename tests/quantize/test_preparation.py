from __future__ import annotations

import numpy as np

from edgeprune.quantize.bits import BitPlan
from edgeprune.quantize.calibrate import Means, Ranges, observe
from edgeprune.quantize.network import Network
from edgeprune.quantize.preparation import corrected, equalized
from tests.quantize.onnx_nets import batches, images, proto, run

LAYERS = Network(proto()).layers


def test_equalisation_changes_weights_and_not_the_function() -> None:
    made = equalized(proto())
    after = Network(made).layers
    changed = [name for name in LAYERS if not np.allclose(LAYERS[name].weight, after[name].weight)]
    assert changed == ["a", "b", "depthwise", "point"]  # a-b and depthwise-point; the stem has two readers, fc follows a hard swish
    np.testing.assert_allclose(run(made, images()[0]), run(proto(), images()[0]), atol=1e-5)
    first = np.abs(after["a"].weight).reshape(16, -1).max(axis=1)
    second = np.abs(np.moveaxis(after["b"].weight, 1, 0)).reshape(16, -1).max(axis=1)
    np.testing.assert_allclose(first, second, rtol=1e-3)


def test_bias_correction_restores_mean_outputs() -> None:
    plan = BitPlan({"stem": "int8"}, {"stem": (2,) * 8})
    target = LAYERS["stem"].output
    means, ranges = Means([layer.input for layer in LAYERS.values()]), Ranges(["input", "relu"])
    observe(proto(), batches(), means, ranges)
    fixed = corrected(proto(), plan, means.found())
    bias = Network(fixed).layers["stem"].bias
    assert bias is not None and not np.allclose(bias, LAYERS["stem"].bias)  # type: ignore[arg-type]  # asserted above
    np.testing.assert_array_equal(Network(fixed).layers["a"].bias, LAYERS["a"].bias)

    def mean(weights_of: object, bias_of: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        import onnx

        from edgeprune.quantize.grid import on_grid, restored

        made = onnx.ModelProto()
        made.CopyFrom(proto())
        for constant in made.graph.initializer:
            if constant.name == "stem.bias":
                constant.CopyFrom(onnx.numpy_helper.from_array(bias_of, constant.name))  # type: ignore[arg-type]
            if constant.name == "stem.weight" and weights_of == "rounded":
                rounded = restored(*on_grid(LAYERS["stem"].weight, (2,) * 8))
                constant.CopyFrom(onnx.numpy_helper.from_array(rounded, constant.name))
        found = Means([target])
        observe(made, batches(), found)
        return np.asarray(found.found()[target].mean(axis=(1, 2)))

    exact = mean("own", LAYERS["stem"].bias)
    assert np.abs(mean("rounded", LAYERS["stem"].bias) - exact).max() > 1e-3
    np.testing.assert_allclose(mean("rounded", bias), exact, atol=1e-4)
