"""The supervised stage under a real Trainer: it learns, and a step does not depend on how its batch was cut."""

import logging
import subprocess
import sys
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from tiny_models import grads, noise, talk, tiny_model

from mmgpt.config import DataConfig, OptimizerConfig, PartRates, RunConfig, TrainerConfig
from mmgpt.data.features import FeatureCache, ImageSource, fingerprint
from mmgpt.data.loader import BatchLoader, Item
from mmgpt.data.messages import Sample, normalize
from mmgpt.data.rejections import RejectionReport
from mmgpt.errors import UsageError
from mmgpt.loop.metrics import read_metrics
from mmgpt.stages.instruct import Instruct, stage_rates

ANSWERS = ["a pear", "a plum on a blue plate", "an apple", "two", "a red cherry", "a lemon, cut in halves", "no", "a fig"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_config(*, stage="instruct", accumulate=1, lr=1e-3, **data) -> RunConfig:
    return RunConfig(
        stage=stage,
        data=DataConfig(**{"max_length": 128, "row_length": 256, "batch_size": 8, **data}),
        optimizer=OptimizerConfig(lr=PartRates(projector=lr, language=lr, vision=lr), clip=0.0),
        trainer=TrainerConfig(accumulate=accumulate),
    )


class Gradients(L.Callback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.found = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found = self.found or grads(module.model)


def fit(model, config, conversations, *, epochs=1, cache=None, validate=False):
    """Train; returns what `Trainer` logged, the gradients of the first step, and the losses of all."""
    items = []
    for number, conversation in enumerate(conversations):
        messages = normalize(conversation)
        items.append(Item(Sample(messages, f"data:{number}"), model.encode(messages)))
    frozen = stage_rates(config)["vision"] == 0
    images = None if model.vision is None else ImageSource(model.vision, cache, frozen)
    stage = Instruct(model, config, images, total_steps=100)
    losses = []
    watch = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, *_: losses.append(float(trainer.callback_metrics["train/loss"]))
    )
    gradients = Gradients()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=config.trainer.accumulate,
        callbacks=[gradients, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    loader, validation = (
        BatchLoader(
            items,
            config.data,
            pad_id=model.tokenizer.pad_id,
            images=images,
            report=RejectionReport(None),
            seed=0,
            shuffle=shuffle,
            accumulate=config.trainer.accumulate if shuffle else 1,
        )
        for shuffle in (True, False)
    )
    trainer.fit(stage, loader, validation if validate else None)
    return trainer.callback_metrics, gradients.found, losses


def pictures(count=8):
    return [talk([noise(i), "What is it?"], ANSWERS[i % len(ANSWERS)]) for i in range(count)]


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_a_few_steps_learn(batching):
    torch.manual_seed(0)
    model = tiny_model("llama")
    metrics, _, losses = fit(model, run_config(lr=3e-3, batching=batching), pictures(), epochs=12, validate=True)
    assert losses[-1] < 0.5 * losses[0]
    assert 0 < float(metrics["val/loss"]) < losses[0] and 0 < float(metrics["val/token_accuracy"]) <= 1
    assert float(metrics["train/fill"]) <= 1 and 0 < float(metrics["train/supervised_share"]) < 1


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_two_small_batches_of_a_step_equal_one_large(batching):
    """Unequal numbers of supervised tokens: a mean of means would weigh the short batch's tokens more."""
    conversations = pictures(8)
    _, large, _ = fit(tiny_model("llama"), run_config(batch_size=8, batching=batching), conversations)
    _, small, _ = fit(tiny_model("llama"), run_config(batch_size=4, accumulate=2, batching=batching), conversations)
    _, unequal, _ = fit(tiny_model("llama"), run_config(batch_size=5, accumulate=2, batching=batching), conversations)
    assert large.keys() == small.keys() == unequal.keys() and len(large) > 20
    for name, gradient in large.items():
        assert torch.isfinite(gradient).all()
        for other in (small, unequal):
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_a_step_is_the_mean_over_tokens():
    conversations = pictures(4)
    model = tiny_model("llama")
    _, found, losses = fit(tiny_model("llama"), run_config(), conversations)
    from tiny_models import make_batch

    batch = make_batch(model, [[conversation] for conversation in conversations])
    result = model.loss(batch)
    (result.loss / result.count).backward()
    assert losses[0] == pytest.approx(float(result.loss / result.count), rel=1e-5)
    for name, gradient in grads(model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_the_last_step_of_an_epoch_may_be_short():
    """Three batches, two a step: the third is a step of its own, and divided by its own tokens alone."""
    conversations = pictures(6)
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = tiny_model("llama")
        steps = []
        config = run_config(batch_size=2, accumulate=accumulate, lr=1e-12)
        items = [Item(Sample(normalize(c), str(i)), model.encode(normalize(c))) for i, c in enumerate(conversations)]
        loader = BatchLoader(
            items, config.data, pad_id=256, images=ImageSource(model.vision, None, False), report=RejectionReport(None),
            seed=0, accumulate=accumulate,
        )  # fmt: skip
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[L.pytorch.callbacks.LambdaCallback(
                on_before_optimizer_step=lambda t, m, o, steps=steps: steps.append(grads(m.model))
            )],
        )  # fmt: skip
        trainer.fit(Instruct(model, config, loader.images, total_steps=10), loader)
        found.append(steps)
    assert [len(steps) for steps in found] == [3, 2]
    for name, gradient in found[0][-1].items():
        torch.testing.assert_close(found[1][-1][name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_align_trains_the_projector_alone_from_cached_features(tmp_path):
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cache = FeatureCache(tmp_path, fingerprint(model.vision), 1)
    fit(model, run_config(stage="align"), pictures(), epochs=2, cache=cache)
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"projector"}
    assert cache.misses == cache.hits == 8  # encoded in the first epoch only


def test_samples_without_pictures_do_not_stop_the_projector_from_training():
    model = tiny_model("llama")
    conversations = [talk("No picture.", "So it is."), talk([noise(0), "What?"], "A pear.")]
    _, _, losses = fit(model, run_config(stage="align", batch_size=1), conversations)
    assert len(losses) == 2
    _, found, _ = fit(tiny_model("llama"), run_config(), conversations[:1])
    assert not found["projector.fc1.weight"].any() and found["language.lm_head.weight"].any()


def test_a_model_of_text_alone_learns_and_cannot_be_aligned():
    torch.manual_seed(0)
    model = tiny_model("gpt2", vision=False)
    _, _, losses = fit(model, run_config(lr=3e-3), [talk("Say it.", "I said it.")] * 8, epochs=10)
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(UsageError, match="every part is frozen"):
        Instruct(model, run_config(stage="align"), None, total_steps=1)


def test_a_checkpoint_holds_what_learns_alone():
    stage = Instruct(tiny_model("llama"), run_config(stage="align"), None, total_steps=1)
    assert {key.split(".")[1] for key in stage.state_dict()} == {"projector"}


def test_sharded_gradients_are_clipped_by_fsdp():
    """Lightning refuses to clip by norm under FSDP, whose own clipping knows the norm of all shards."""

    clipped: list[float] = []
    config = run_config()
    config.trainer.strategy = "fsdp"
    stage = Instruct(tiny_model(), config, None, total_steps=1)
    sharded = SimpleNamespace(clip_grad_norm_=clipped.append)
    stage._trainer = SimpleNamespace(model=sharded, precision_plugin=FSDPPrecision("bf16-mixed"))
    stage.configure_gradient_clipping(None, 0.5, "norm")
    stage.configure_gradient_clipping(None, None)
    assert clipped == [0.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP needs a GPU")
def test_fsdp_on_one_rank_learns_what_one_device_does(tmp_path):
    command = [sys.executable, "-m", "mmgpt.train", "--config", "nano/shapes", "--trainer.progress", "false"]
    command += ["--trainer.max_steps", "20", "--trainer.devices", "1", "--trainer.precision", "fp32", "--evaluate.final", "0"]
    last = {}
    for strategy in ("auto", "fsdp"):
        folder = tmp_path / strategy
        subprocess.run([*command, "--trainer.strategy", strategy, "--run_dir", str(folder)], check=True)
        assert (folder / "model" / "model.safetensors").is_file()
        last[strategy] = read_metrics(folder / "metrics.csv")["train/loss"][-1]
    assert last["fsdp"] == pytest.approx(last["auto"], rel=1e-2)
