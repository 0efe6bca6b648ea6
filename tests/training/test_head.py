"""The head by hand: values against numpy in float64, gradients against autograd through a whole log-softmax."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from prefpipe.training import head as module
from prefpipe.training.head import Head, token_kl, token_logps

HEADS = {
    "linear": {"bias": False},
    "biased": {"bias": True},
    "capped": {"bias": False, "softcap": 2.0},
    "scaled": {"bias": False, "scale": 0.3},
    "all": {"bias": True, "softcap": 1.5, "scale": 2.0},
    "frozen": {"bias": True, "softcap": 1.5, "frozen": True},
}


def made(
    kind: str, dtype: torch.dtype = torch.float64, *, vocabulary: int = 23
) -> tuple[Head, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    settings = dict(HEADS[kind])
    linear = nn.Linear(8, vocabulary, bias=settings.pop("bias"), dtype=torch.float64)
    linear.requires_grad_(not settings.pop("frozen", False))
    hidden = torch.randn(19, 8, dtype=torch.float64).to(dtype).requires_grad_()
    return Head(linear.to(dtype), **settings), hidden, torch.randint(0, vocabulary, (19,))


def by_hand(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and log sum p^2, position by position."""
    weight = head.module.weight.detach().double().numpy()
    bias = 0.0 if head.module.bias is None else head.module.bias.detach().double().numpy()
    logps, squares = [], []
    for state, target in zip(hidden.detach().double().numpy(), targets.tolist(), strict=True):
        scores = (weight @ state + bias) * head.scale
        if head.softcap is not None:
            scores = np.tanh(scores / head.softcap) * head.softcap
        scores = scores - scores.max()
        p = np.exp(scores) / np.exp(scores).sum()
        logps.append(np.log(p[target]))
        squares.append(np.log((p**2).sum()))
    return np.array(logps), np.array(squares)


@pytest.mark.parametrize("tile", [1, 7, 1000])
@pytest.mark.parametrize("mode", ["plain", "chunked", "auto"])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients(kind, mode, tile, monkeypatch):
    monkeypatch.setattr(module, "_tile_rows", lambda vocabulary, device: tile)
    head, hidden, targets = made(kind)
    found = token_logps(head, hidden, targets, mode=mode, collision=True)
    logps, squares = by_hand(head, hidden, targets)
    np.testing.assert_allclose(found.logps.detach().numpy(), logps, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.collision.numpy(), squares, rtol=1e-12, atol=1e-12)
    assert not found.collision.requires_grad

    upstream = torch.linspace(-1, 2, 19, dtype=torch.float64)
    wanted = [hidden, *(p for p in head.module.parameters() if p.requires_grad)]
    mine = torch.autograd.grad((upstream * found.logps).sum(), wanted)
    whole = head(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    for one, other in zip(mine, torch.autograd.grad((upstream * whole).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", ["plain", "chunked"])
def test_a_head_with_something_around_it_is_called(mode):
    """An adapter gets its gradient (trl#5709)."""
    head, hidden, targets = made("biased")
    adapted = Head(nn.Sequential(head.module))
    out = token_logps(adapted, hidden, targets, mode=mode, collision=True)
    np.testing.assert_allclose(out.logps.detach().numpy(), by_hand(head, hidden, targets)[0], atol=1e-12)
    np.testing.assert_allclose(out.collision.numpy(), by_hand(head, hidden, targets)[1], atol=1e-12)
    out.logps.sum().backward()
    assert head.module.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("mode", ["plain", "chunked"])
def test_lower_precision(dtype, tolerance, mode):
    head, hidden, targets = made("linear", dtype)
    out = token_logps(head, hidden, targets, mode=mode)
    assert out.logps.dtype == torch.float32
    np.testing.assert_allclose(out.logps.detach().numpy(), by_hand(head, hidden, targets)[0], atol=tolerance)
    out.logps.sum().backward()
    assert hidden.grad.dtype == head.module.weight.grad.dtype == dtype


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["plain", "chunked"])
def test_under_autocast_it_multiplies_as_a_linear_layer_does(mode, given, frozen):
    """In bf16, whatever type the last norm hands over; weights stay float32, and so does their gradient."""
    head, hidden, targets = made("linear", torch.float32)
    head.module.requires_grad_(not frozen)
    exact = token_logps(head, hidden, targets).logps
    wanted = [hidden, *(() if frozen else (head.module.weight,))]
    expected = torch.autograd.grad(exact.sum(), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = token_logps(head, hidden.to(given), targets, mode=mode).logps
        logits = head.module(hidden).float()
    assert logits.double().unique().equal(logits.bfloat16().double().unique())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], atol=1e-5, rtol=0.0)
    for mine, theirs in zip(torch.autograd.grad(out.sum(), wanted), expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=0.2, rtol=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["plain", "chunked"])
def test_on_a_gpu_logits_of_16_bit_factors_are_float32(mode, frozen):
    """Against the product of the rounded factors in float64; logits in 16 bits would miss it by a hundred times."""
    head, hidden, targets = made("linear", torch.float32)
    head.module.requires_grad_(not frozen)
    factors = [factor.detach().bfloat16().double() for factor in (hidden, head.module.weight)]
    exact = (factors[0] @ factors[1].T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (wanted,) = torch.autograd.grad(token_logps(head, hidden, targets).logps.sum(), [hidden])
    on_gpu = replace(head, module=head.module.cuda())
    given = hidden.detach().cuda().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = token_logps(on_gpu, given, targets.cuda(), mode=mode).logps
    out.sum().backward()
    torch.testing.assert_close(out.detach().cpu().double(), exact, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(given.grad.cpu(), wanted, atol=0.2, rtol=0.0)
    assert frozen or on_gpu.module.weight.grad.dtype == torch.float32


def test_a_uniform_model_gives_minus_log_v_for_each_token():
    head = Head(nn.Linear(4, 50, bias=False))
    nn.init.zeros_(head.module.weight)
    out = token_logps(head, torch.randn(3, 4), torch.tensor([3, 4, 1]))
    assert out.logps.tolist() == pytest.approx([-np.log(50)] * 3, abs=1e-6)


def test_kl_and_its_gradient_against_a_loop():
    (head, hidden, _), torch_seed = made("all"), 5
    torch.manual_seed(torch_seed)
    other = Head(nn.Linear(8, 23, dtype=torch.float64), softcap=1.5)
    states = torch.randn(19, 8, dtype=torch.float64)
    found = token_kl(head, hidden, other, states)
    mine, theirs = head(hidden).log_softmax(-1), other(states).log_softmax(-1)
    expected = [sum(q.exp() * (q - p) for q, p in zip(*rows, strict=True)) for rows in zip(theirs, mine, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert (found >= 0).all()
    for one, two in zip(
        torch.autograd.grad(found.sum(), [hidden, head.module.weight]),
        torch.autograd.grad(torch.stack(expected).sum(), [hidden, head.module.weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in other.module.parameters())
