"""Every rule against one sample at a time, in float64."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import Dense, Factored, GradientBlock, GradientCapture, Rows, select
from tests.reference import per_sample_gradients

EXACT = {"rtol": 1e-10, "atol": 1e-12}
B = 5


class Wrapped(nn.Module):
    """A layer inside a model, its outputs reduced to one number per sample in a way that treats every entry apart."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.layer(*args, **kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        total = 0
        for out in outputs:
            if out is not None:
                out = out.flatten(1)
                total = total + (torch.sin(out) * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sum(1)
        return total  # type: ignore[return-value]


def captured(module: nn.Module, args: Sequence[Any], parameters: str = "*", **kwargs: Any) -> dict[str, GradientBlock]:
    with GradientCapture(select(module, parameters)) as capture:
        capture.begin(len(args[0]))
        capture.backward(module(*args, **kwargs).sum())
        return capture.collect()


def check(layer: nn.Module, *args: Any, per_sample: Sequence[bool] | None = None, **kwargs: Any) -> dict[str, Any]:
    """Rows equal the gradients of single samples; arguments not ``per_sample`` are shared by all of them."""
    module = Wrapped(layer).double()
    apart = per_sample or [True] * len(args)

    def one(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        singles = tuple(a[n : n + 1] if split else a for a, split in zip(args, apart, strict=True))
        return singles, {k: v[n : n + 1] if isinstance(v, Tensor) and v.shape[0] == B else v for k, v in kwargs.items()}

    names = [name for name, _ in module.named_parameters()]
    truth = per_sample_gradients(module, lambda m, s: m(*s[0], **s[1]).sum(), [one(n) for n in range(B)], names)
    found = captured(module, args, **kwargs)
    assert set(found) == set(truth)
    for name, expected in truth.items():
        torch.testing.assert_close(found[name].dense(), expected, **EXACT)
        assert found[name].num_samples == B and found[name].shape == tuple(expected.shape[1:])
    assert all(parameter.grad is None for parameter in module.parameters())
    return {name.removeprefix("layer."): part for name, part in found.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(*shape: int, high: int = 11) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("middle", [(), (3,), (3, 2), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_any_number_of_dimensions(middle: tuple[int, ...], bias: bool) -> None:
    check(nn.Linear(4, 6, bias=bias), normal(B, *middle, 4))


def test_linear_keeps_the_smaller_form() -> None:
    assert isinstance(check(nn.Linear(20, 30), normal(B, 2, 20))["weight"], Factored)
    assert isinstance(check(nn.Linear(3, 2), normal(B, 9, 3))["weight"], Dense)


def test_transposed_linear_of_transformers() -> None:
    class Conv1D(nn.Module):
        """Weight (I, O), and an output that is a view, as in transformers."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(normal(4, 6)), nn.Parameter(normal(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 6)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    assert isinstance(check(Conv1D(), normal(B, 2, 4))["weight"], Factored)
    assert isinstance(check(Conv1D(), normal(B, 7, 4))["weight"], Dense)
    check(Conv1D(), normal(B, 4))


def test_the_real_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    found = check(conv1d(30, 20), normal(B, 2, 20))
    assert isinstance(found["weight"], Factored)


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 3}, {"padding_idx": -1}, {"sparse": True}, {"max_norm": 1.0}, {"_freeze": True}]
)
@pytest.mark.parametrize("shape", [(B,), (B, 7), (B, 2, 4)])
def test_embedding(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    found = check(nn.Embedding(11, 4, **options), tokens(*shape))
    assert isinstance(found["weight"], Rows)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_bag(mode: str, padding_idx: int | None) -> None:
    bag = nn.EmbeddingBag(11, 4, mode=mode, padding_idx=padding_idx)
    check(bag, tokens(B, 7, high=5))


def test_embedding_bag_with_weights() -> None:
    check(
        nn.EmbeddingBag(11, 4, mode="sum", padding_idx=1),
        tokens(B, 7, high=5),
        None,
        normal(B, 7),
        per_sample=[True, False, True],
    )


@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("last", [True, False])
def test_embedding_bag_with_offsets(mode: str, last: bool, weighted: bool) -> None:
    lengths = [3, 0, 1, 4, 2]  # one bag is empty
    ids, weights = tokens(sum(lengths), high=6), normal(sum(lengths)) if weighted else None
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    module = Wrapped(nn.EmbeddingBag(11, 4, mode=mode, include_last_offset=last, padding_idx=2)).double()
    given = offsets if last else offsets[:-1]
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        capture.backward(module(ids, given, weights).sum())
        found = capture.collect()["layer.weight"]
    pieces = [slice(int(a), int(b)) for a, b in itertools.pairwise(offsets)]
    samples = [
        (ids[p], torch.tensor([0, p.stop - p.start] if last else [0]), None if weights is None else weights[p])
        for p in pieces
    ]
    truth = per_sample_gradients(module, lambda m, s: m(*s).sum(), samples)["layer.weight"]
    torch.testing.assert_close(found.dense(), truth, **EXACT)
    assert isinstance(found, Rows)


CONVOLUTIONS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    (lambda: nn.Conv1d(4, 6, 5, padding="same", dilation=2), (4, 9)),
    (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (4, 9)),
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2, bias=False), (4, 8)),
    (lambda: nn.Conv1d(20, 30, 3), (20, 5)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2), (4, 8, 7)),
    (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 2), dilation=(2, 1)), (4, 7, 6)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (4, 5, 6)),
    (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=(2, 1), padding=1), (4, 5, 6)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 6)),
    (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="replicate", stride=2), (4, 5, 6)),
    (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", dilation=2), (4, 5, 6)),
    (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 5, 6)),
    (lambda: nn.Conv3d(2, 4, 2, padding=1, stride=(1, 2, 1)), (2, 3, 4, 3)),
    (lambda: nn.Conv3d(2, 4, (2, 1, 3), groups=2, padding="same", padding_mode="replicate"), (2, 3, 4, 3)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=range(len(CONVOLUTIONS)))
def test_convolution(case: tuple[Callable[[], nn.Module], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = case
    check(make(), normal(B, *shape))
    monkeypatch.setattr("lightning_influence.gradients.blocks.CHUNK_ELEMENTS", 64)  # a few samples at a time
    check(make(), normal(B, *shape))


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
    size=st.integers(8, 11),
    extra=st.integers(1, 3),
)
def test_convolution_of_any_geometry(
    kernel: int, stride: int, dilation: int, padding: int, groups: int, size: int, extra: int
) -> None:
    check(nn.Conv1d(2, 2 * extra, kernel, stride, padding, dilation, groups), normal(B, 2, size))


def test_normalisation() -> None:
    check(nn.LayerNorm(6), normal(B, 6))
    check(nn.LayerNorm(6), normal(B, 3, 6))
    check(nn.LayerNorm((3, 6)), normal(B, 2, 3, 6))
    check(nn.LayerNorm(6, bias=False), normal(B, 3, 6))
    check(nn.GroupNorm(2, 6), normal(B, 6))
    check(nn.GroupNorm(3, 6), normal(B, 6, 4))
    check(nn.GroupNorm(2, 6), normal(B, 6, 3, 2))


@pytest.mark.parametrize(
    "case",
    [(nn.BatchNorm1d, (6,)), (nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (6, 3, 2)), (nn.BatchNorm3d, (6, 2, 3, 2))],
)
def test_batch_norm_in_eval_mode(case: tuple[type[nn.BatchNorm1d], tuple[int, ...]]) -> None:
    layer = case[0](6).double()
    layer(normal(9, *case[1]) * 3 + 1)  # running statistics that are not 0 and 1
    check(layer.eval(), normal(B, *case[1]))


def test_batch_norm_with_batch_statistics_is_refused() -> None:
    for layer in (nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False).eval()):
        with pytest.raises(CaptureError, match="statistics of the batch"):
            captured(Wrapped(layer).double(), [normal(B, 6)])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(need_weights: bool, training: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x, padding = normal(B, B, 8), torch.zeros(B, B, dtype=torch.bool)
    padding[1, 3:], padding[2, 4:] = True, True
    shared = torch.triu(torch.ones(B, B, dtype=torch.bool), 1)  # as long as the batch on purpose
    found = check(layer, x, x, x, padding, need_weights, per_sample=[True] * 4 + [False])
    assert set(found) == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    check(layer, x, x, x, None, need_weights, shared, per_sample=[True] * 3 + [False] * 3)


def test_multihead_attention_with_keys_of_their_own_and_masks_per_head() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=5, vdim=3, add_bias_kv=True)
    check(layer, normal(B, 4, 8), normal(B, 6, 5), normal(B, 6, 3))
    layer = nn.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=True)
    x = normal(B, 4, 8)
    mask = normal(B * 2, 4, 4)
    module = Wrapped(layer).double()
    samples = [(x[n : n + 1], mask[2 * n : 2 * n + 2]) for n in range(B)]
    truth = per_sample_gradients(module, lambda m, s: m(s[0], s[0], s[0], attn_mask=s[1]).sum(), samples)
    found = captured(module, [x, x, x], attn_mask=mask)
    for name, expected in truth.items():
        torch.testing.assert_close(found[name].dense(), expected, **EXACT)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_recurrent(kind: type[nn.LSTM], options: dict[str, Any]) -> None:
    class Sequence(nn.Module):
        """The states too are part of the loss, and their samples are in the second dimension."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(4, 3, batch_first=True, **options)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, state = self.rnn(x)
            return out, (state[0] * state[1] if isinstance(state, tuple) else state).transpose(0, 1)

    check(Sequence(), normal(B, 6, 4))


def test_recurrent_with_a_given_state() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.rnn(x, h.transpose(0, 1).contiguous())[0]  # type: ignore[no-any-return]

    check(Started(), normal(B, 6, 4), normal(B, 1, 3))


class Scaled(nn.Module):
    """A layer of the user's own: a parameter, a child, a shared argument, two outputs, one made of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(normal(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor, *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        h = self.inner(x * self.scale + table) + shift
        return h, h.tanh() * self.scale


def test_any_other_layer_falls_back_to_vmap() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Scaled(), normal(B, 3, 4), normal(3, 4), per_sample=[True, False], shift=0.3)
        check(nn.Bilinear(3, 4, 2), normal(B, 3), normal(B, 4))
        check(nn.ConvTranspose2d(3, 4, 2, stride=2), normal(B, 3, 4, 4))
        check(nn.PReLU(), normal(B, 3))
        check(nn.RMSNorm(4), normal(B, 3, 4))


def test_a_layer_that_vmap_cannot_see_through_is_looped_over() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(normal(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row * self.w if float(row.detach().sum()) > 0 else row + self.w**2 for row in x])

    check(Branching(), normal(B, 4))


class Looped(nn.Module):
    """Makes a wrapped layer whose forward is given as a function, with one parameter w."""

    def __init__(self, body: Callable[[Looped, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.body, self.calls = nn.Parameter(normal(4)), body, 0
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(self, x)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x * self.w - (x * self.w).mean(0),
        lambda self, x: x * self.w * self.calls,
        lambda self, x: x * self.w * torch.rand(4, dtype=x.dtype),
    ],
    ids=["coupled samples", "state", "randomness"],
)
def test_a_layer_that_does_not_do_the_same_again_is_refused(body: Callable[[Looped, Tensor], Tensor]) -> None:
    layer = Looped(body).eval()
    state = torch.get_rng_state()
    torch.rand(4, dtype=torch.float64)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with pytest.raises(CaptureError, match=r"'layer\.w' \(Looped\) gave another output"):
        captured(Wrapped(layer), [normal(B, 4)])
    assert torch.equal(torch.get_rng_state(), after if "rand" in body.__code__.co_names else state)


def test_dropout_inside_a_layer_that_runs_again_is_refused_and_eval_mode_is_fine() -> None:
    layer = Looped(lambda self, x: self.drop(x * self.w))
    with pytest.raises(CaptureError, match=r"dropout of 0\.5 in drop"):
        captured(Wrapped(layer), [normal(B, 4)])
    check(layer.eval(), normal(B, 4))
    attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
    x = normal(B, 3, 4)
    with pytest.raises(CaptureError, match=r"dropout of 0\.1"):
        captured(Wrapped(attention).double(), [x, x, x])
    check(attention.eval(), x, x, x)


def test_a_layer_with_an_argument_as_long_as_the_batch_is_not_silently_wrong() -> None:
    with pytest.raises(CaptureError, match="another output"):
        captured(Wrapped(Scaled()).double(), [normal(B, B, 4), normal(B, 4)], "layer.scale")


@pytest.mark.parametrize(
    ("layer", "args", "message"),
    [
        (nn.Embedding(11, 4, scale_grad_by_freq=True), [tokens(B, 3)], "how often"),
        (nn.EmbeddingBag(11, 4, mode="max"), [tokens(B, 3)], "not kept by words"),
        (nn.MultiheadAttention(4, 2), [normal(B, B, 4)] * 3, "time in its first"),
        (nn.LSTM(4, 2), [normal(B, B, 4)], "samples first"),
    ],
)
def test_layers_without_a_gradient_per_sample_are_refused(layer: nn.Module, args: list[Tensor], message: str) -> None:
    if isinstance(layer, nn.LSTM):

        class First(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = layer

            def forward(self, x: Tensor) -> Tensor:
                return self.rnn(x)[0]  # type: ignore[no-any-return]

        layer = First()
    with pytest.raises(CaptureError, match=message) as caught:
        captured(Wrapped(layer).double(), args)
    assert "HINT" in str(caught.value)


def test_time_first_is_refused_where_it_shows() -> None:
    model = nn.Linear(4, 2).double()
    with GradientCapture(select(model, "*")) as capture:
        capture.begin(B)
        total = model(normal(12, B, 4)).sum()
        with pytest.raises(CaptureError, match="samples in its first dimension") as caught:
            capture.backward(total)
    assert "batch_first" in str(caught.value) and "(12, 5, 2)" in str(caught.value)


def test_positions_that_are_looked_up_once_for_all_samples_are_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.positions = nn.Embedding(11, 4), nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.words(x) + self.positions(torch.arange(x.shape[1])[None])  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match=r"layer\.positions\.weight.*samples in its first"):
        captured(Wrapped(Positions()).double(), [tokens(B, 7)])
    check_words = captured(Wrapped(Positions()).double(), [tokens(B, 7)], "word_embeddings")
    assert list(check_words) == ["layer.words.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradients_agree_within_its_precision(dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.own = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Bilinear(8, 8, 3)
            self.head, self.attention = nn.Linear(8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
            self.narrow = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.embed(x))
            narrow = self.narrow(h)  # in the type of autocast
            h = h + self.attention(narrow, narrow, narrow)[0]
            return F.log_softmax(self.head(h).mean(1) + self.own(h[:, 0], h[:, 1]), -1)[:, 0]

    torch.manual_seed(0)
    net, x = Net(), tokens(B, 6)
    truth = per_sample_gradients(net, lambda m, s: m(s).sum(), [x[n : n + 1] for n in range(B)])
    with GradientCapture(select(net, "all")) as capture:
        capture.begin(B)
        with torch.autocast("cpu", dtype=dtype):
            total = net(x).sum()
        capture.backward(total)  # outside autocast, as every training loop does it
        found = capture.collect()
    for name, expected in truth.items():
        error = torch.linalg.vector_norm(found[name].dense().double() - expected) / torch.linalg.vector_norm(expected)
        assert error < 5e-2, (name, float(error))
