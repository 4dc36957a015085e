"""What FSDP2 and DeepSpeed do not support is named before the models are prepared."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from support import tiny
from support.training import config

from vlmkernels.train.parallel import check_parallelism

ACCELERATORS = {
    "fsdp2": SimpleNamespace(
        is_fsdp2=True,
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=False)),
    ),
    "zero2": SimpleNamespace(
        is_fsdp2=False,
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=SimpleNamespace(zero_stage=2, deepspeed_config={"zero_optimization": {}}),
    ),
    "none": SimpleNamespace(is_fsdp2=False, distributed_type=DistributedType.NO),
}


def quantized():
    model = tiny.text_model()
    model.hf_quantizer = object()
    return model


@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
@pytest.mark.parametrize("is_teacher", [False, True])
def test_quantized_models(tmp_path, name, is_teacher):
    models = (tiny.text_model(), quantized()) if is_teacher else (quantized(), None)
    with pytest.raises(ValueError, match=r"quantization_config must be None under FSDP2 and DeepSpeed: .* a quantized model"):
        check_parallelism(ACCELERATORS[name], *models, config(tmp_path))
    check_parallelism(ACCELERATORS["none"], *models, config(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "fsdp2",
            {"activation_offloading": True},
            "activation_offloading must be False under FSDP2 and DeepSpeed, .* got True",
        ),
        (
            "zero2",
            {"activation_offloading": True},
            "activation_offloading must be False under FSDP2 and DeepSpeed, .* got True",
        ),
        ("zero2", {"on_nonfinite": "skip"}, "on_nonfinite must be 'raise' under DeepSpeed, .* got 'skip'"),
    ],
)
def test_options(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        check_parallelism(ACCELERATORS[name], tiny.text_model(), None, config(tmp_path, **options))
    check_parallelism(ACCELERATORS[name], tiny.text_model(), None, config(tmp_path))
