"""Training with transformers' Trainer, peft and trl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits.optim
from fewbits import nn
from hf_models import CONFIGS, DATA, IDS, VOCABULARY, install, load, logits, losses, make_llama, train

transformers: Any = install()
peft: Any = pytest.importorskip("peft")

# What `optim=` may say, the class, the width of states, and whether they are paged.
OPTIMIZERS: dict[str, tuple[type, int, bool]] = {
    "adamw_bnb_8bit": (fewbits.optim.AdamW, 8, False),
    "adamw_8bit": (fewbits.optim.AdamW, 8, False),
    "paged_adamw_8bit": (fewbits.optim.AdamW, 8, True),
    "paged_adamw_32bit": (fewbits.optim.AdamW, 32, True),
    "lion_8bit": (fewbits.optim.Lion, 8, False),
    "lion_32bit": (fewbits.optim.Lion, 32, False),
    "paged_lion_8bit": (fewbits.optim.Lion, 8, True),
    "paged_lion_32bit": (fewbits.optim.Lion, 32, True),
    "rmsprop_bnb": (fewbits.optim.RMSprop, 32, False),
    "rmsprop_bnb_8bit": (fewbits.optim.RMSprop, 8, False),
    "rmsprop_bnb_32bit": (fewbits.optim.RMSprop, 32, False),
    "ademamix": (fewbits.optim.AdEMAMix, 32, False),
    "ademamix_8bit": (fewbits.optim.AdEMAMix, 8, False),
    "paged_ademamix_32bit": (fewbits.optim.AdEMAMix, 32, True),
    "paged_ademamix_8bit": (fewbits.optim.AdEMAMix, 8, True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(transformers, tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _no_overrides() -> Any:
    manager = fewbits.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield
    manager.initialize()


def with_adapters(model: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **kwargs)
    return peft.get_peft_model(peft.prepare_model_for_kbit_training(model), config)


@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_the_trainer(base: Path, tmp_path: Path, name: str) -> None:
    cls, bits, paged = OPTIMIZERS[name]
    trainer = train(transformers, load(transformers, base, dtype=torch.float32), tmp_path, optim=name)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(optimizer) is cls
    assert optimizer.is_paged is paged
    model = trainer.model
    large, table = model.model.layers[0].mlp.up_proj.weight, model.model.embed_tokens.weight
    assert optimizer.state[large]["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)
    assert optimizer.state[table]["state1"].dtype == torch.float32
    if bits == 8:
        # The Trainer asks for it, if the name of the class says bitsandbytes.
        assert optimizer.mng.module_weight_config_triple[0] == (
            model.model.embed_tokens,
            "weight",
            {"optim_bits": 32},
        )
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "adamw_8bit"])
def test_resume(base: Path, tmp_path: Path, name: str) -> None:
    def run(path: Path, **kwargs: Any) -> list[float]:
        model = with_adapters(load(transformers, base, "nf4-double"))
        return losses(train(transformers, model, path, steps=4, optim=name, lr_scheduler_type="constant", **kwargs))

    whole = run(tmp_path, save_strategy="steps", save_steps=2)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert resumed[-2:] == whole[-2:]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(base: Path, tmp_path: Path, name: str, kind: str) -> None:
    model = load(transformers, base, name)
    base_layer = model.model.layers[0].mlp.up_proj
    stored = base_layer.weight.data.clone()
    tuned = with_adapters(model, use_dora=kind == "dora")
    trainer = train(transformers, tuned, tmp_path / "run", steps=6, eval_strategy="steps", eval_steps=2)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert torch.equal(base_layer.weight.data.view(torch.uint8), stored.view(torch.uint8)), "the base model was trained"
    assert next(p for n, p in tuned.named_parameters() if "lora_B" in n).abs().max() > 0
    expected = logits(tuned)
    assert not torch.equal(expected, logits(load(transformers, base, name)))

    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        peft.prepare_model_for_kbit_training(load(transformers, base, name)), tmp_path / "adapter"
    )
    # peft keeps reloaded adapters as they were saved: the same numbers, to the rounding of their dtype.
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)

    merged = tuned.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) in (nn.Linear4bit, nn.Linear8bitLt)
    difference = (logits(merged).float() - expected.float()).norm() / expected.float().norm()
    assert difference < (0.1 if name.startswith("int8") else 0.4)


def test_learning_goes_on_after_an_evaluation(base: Path, tmp_path: Path) -> None:
    model = with_adapters(load(transformers, base, "nf4-double"))
    logits(model)
    first = train(transformers, model, tmp_path / "a", steps=3)
    logits(model)
    second = train(transformers, model, tmp_path / "b", steps=3)
    assert losses(second)[-1] < losses(first)[-1] < losses(first)[0]


def test_compiled_model(base: Path) -> None:
    model = load(transformers, base, "nf4-double")
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer(base: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="1"
    )
    data = datasets.Dataset.from_list([{"input_ids": entry["input_ids"].tolist()} for entry in DATA])
    arguments = trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim="paged_adamw_8bit",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        max_length=16,
        packing=False,
    )
    trainer = trl.SFTTrainer(
        load(transformers, base, "nf4-double"),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.model(IDS).logits.shape == (2, 9, VOCABULARY)
