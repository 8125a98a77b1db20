"""One run of all that trains: a Recurrent Transformer by SOAP under Seesaw, its precision switched, killed, resumed."""

import os
import signal

import pytest
import torch
from effml_arch import RecurrentTransformer, RecurrentTransformerConfig
from effml_optim import SOAP, SeesawPlan, split_params
from effml_quant import PrecisionScheme, PrecisionSwitch, apply_scheme
from effml_shared.checkpoint import Checkpoints
from effml_shared.data import ByteTokenizer, Loader, PackedDataset
from effml_shared.errors import ConfigError, Interrupted
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.steps import GradientStep, language_model_loss

TEXT = [f"{i} plus {i} is {2 * i}. " * 3 for i in range(80)]
SAMPLES, SWITCH = 96, 7
PLAN = SeesawPlan.from_cosine(SAMPLES, 8, 4, alpha=2.0, unit=4)
SCHEME = PrecisionScheme.mx("mxfp8_e4m3", scale_rule="rceil", gradient_rounding="stochastic", norm_affine="mxfp8_e4m3")


class Record(Hook):
    """Keep what each step did: its loss, its batch size and the scheme it left in force."""

    def __init__(self, switch):
        self.switch, self.steps, self.samples = switch, [], 0

    def on_start(self, loop):
        self.samples = loop.clock.samples

    def on_step(self, loop, metrics):
        self.steps.append((metrics["loss"], loop.clock.samples - self.samples, self.switch.handle.scheme))
        self.samples = loop.clock.samples


class Kill(Hook):
    """End the run after a step, before its checkpoint is written or by the signal that a cluster sends."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_step(self, loop, metrics):
        if loop.clock.step == self.step:
            if self.how == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise RuntimeError("the machine is gone")


def train(directory, *hooks, backend="naive"):
    """Train to the end, or go on to it, and return the step with its model and optimizer, and the record of steps."""
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 32, "vocab_size": 258}
    model = RecurrentTransformer(RecurrentTransformerConfig(**shape, recurrent_layers=(1,), backend=backend))
    switch = PrecisionSwitch(apply_scheme(model, None), {SWITCH: SCHEME})
    step = GradientStep(model, SOAP(split_params(model), lr=0.01, precondition_frequency=3), language_model_loss)
    record = Record(switch)
    loop = Loop(
        step,
        Loader(PackedDataset(TEXT, ByteTokenizer(), 9)),
        PLAN,
        budget=Budget(samples=SAMPLES),
        hooks=[switch, record, *hooks],
        checkpoints=Checkpoints(directory),
        save_every=0.0,
    )
    loop.run()
    return step, record.steps


def tensors(state, path=""):
    """Yield every tensor and number of a state by its path."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from tensors(value, f"{path}/{key}")
    else:
        yield path, state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_it_learns_while_batch_and_precision_change(whole):
    _, steps = whole
    losses, batches, schemes = zip(*steps, strict=True)
    assert losses[-1] < losses[0] - 1.0
    assert len(steps) == PLAN.total_steps < SAMPLES // 4
    assert batches[0] == 4 < max(batches)
    assert [scheme is not None for scheme in schemes] == [step >= SWITCH for step in range(1, len(steps) + 1)]


@pytest.mark.parametrize(
    ("after", "how"), [(SWITCH - 2, "crash"), (SWITCH, "SIGTERM"), (PLAN.total_steps - 2, "SIGTERM")]
)
def test_a_killed_run_ends_as_the_whole_one_bit_by_bit(after, how, whole, tmp_path):
    with pytest.raises(Interrupted if how == "SIGTERM" else RuntimeError):
        train(tmp_path, Kill(after, how))
    resumed, steps = train(tmp_path)
    done = after if how == "SIGTERM" else after - 1  # a crash loses the step whose checkpoint was not written
    assert steps == whole[1][done:]
    ours, theirs = (dict(tensors(step.state_dict())) for step in (resumed, whole[0]))
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]) if isinstance(value, torch.Tensor) else value == ours[name], name


def test_the_folded_recurrence_refuses_what_it_would_pass_over(tmp_path):
    """The tiled algorithm reads weights and calls no layers: it must not train in a precision that it does not have."""
    with pytest.raises(ConfigError, match=r"^model\.layers\.1\.backend: got 'tiled', .* expected backend=\"naive\"$"):
        train(tmp_path, backend="tiled")
    assert not list(tmp_path.iterdir())  # said before the first step, not at the one that switches
