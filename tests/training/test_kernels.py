"""Kernels for GPUs: their layouts and masks against a loop over tokens here, the kernels themselves where a GPU is."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from prefpipe.training import kernels
from prefpipe.training.attention import DOCUMENTS, Document, documents_attention
from prefpipe.training.kernels import fastest_attention, flex_attention, layout, varlen_attention, why_not

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

DOCUMENT_LISTS = {
    "one": [Document(0, 9, read=4)],
    "packed": [Document(0, 5, read=2), Document(5, 6, read=5), Document(6, 14, read=12)],
    "shared": [Document(0, 8, read=5), Document(8, 12, read=9), Document(12, 15, 0, 6, 12), Document(15, 20, 8, 2, 15)],
}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
HALVES = [torch.bfloat16, torch.float16]


def inputs(length, heads=4, key_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, length, size), (1, key_heads, length, size), (1, key_heads, length, size))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def token_by_token(query, key, value, documents, *, window=None, softcap=None):
    """Each token against the keys that it may see, listed one after the other."""
    out = torch.zeros(1, query.shape[2], query.shape[1], query.shape[3], dtype=query.dtype)
    for document in documents:
        prompt = list(range(document.prompt, document.prompt + document.shared))
        for token in range(document.start, document.end):
            seen = prompt + list(range(document.start, token + 1))
            seen = seen if window is None else seen[-window:]
            for head in range(query.shape[1]):
                group = head * key.shape[1] // query.shape[1]
                scores = key[0, group, seen] @ query[0, head, token] / query.shape[3] ** 0.5
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                out[0, token, head] = scores.softmax(0) @ value[0, group, seen]
    return out


def plain_varlen(query, key, value, places, scale, window):
    """What flash-attention says of its arguments: sequences between the ends, the last query sees the last key."""
    out = torch.zeros_like(query)
    for number in range(len(places.query_ends) - 1):
        q0, q1 = places.query_ends[number : number + 2].tolist()
        k0, k1 = places.key_ends[number : number + 2].tolist()
        for token in range(q0, q1):
            last = k1 - (q1 - token) + 1
            first = k0 if window is None else max(k0, last - window)
            for head in range(query.shape[1]):
                group = head * key.shape[1] // query.shape[1]
                scores = key[first:last, group] @ query[token, head] / query.shape[2] ** 0.5
                out[token, head] = scores.softmax(0) @ value[first:last, group]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", DOCUMENT_LISTS)
def test_the_loop_and_the_layouts_give_what_each_token_may_see(name, window):
    documents = DOCUMENT_LISTS[name]
    given = inputs(documents[-1].end)
    expected = token_by_token(*given, documents, window=window)
    options = {"documents": documents, "sliding_window": window}
    torch.testing.assert_close(documents_attention(None, *given, None, **options)[0], expected)
    torch.testing.assert_close(varlen_attention(None, *given, None, **options, kernel=plain_varlen)[0], expected)
    torch.testing.assert_close(flex_attention(None, *given, None, **options)[0], expected)


@pytest.mark.parametrize("name", DOCUMENT_LISTS)
def test_what_is_not_read_is_zero(name):
    documents = DOCUMENT_LISTS[name]
    given = inputs(documents[-1].end)
    expected = token_by_token(*given, documents)
    for document in documents:
        expected[:, document.start : document.read] = 0
    options = {"documents": documents, "only_read": True}
    torch.testing.assert_close(documents_attention(None, *given, None, **options)[0], expected)
    torch.testing.assert_close(varlen_attention(None, *given, None, **options, kernel=plain_varlen)[0], expected)


def test_soft_capped_scores():
    documents = DOCUMENT_LISTS["shared"]
    given = inputs(documents[-1].end)
    expected = token_by_token(*given, documents, softcap=0.5)
    assert not torch.allclose(expected, token_by_token(*given, documents))
    for attention in (documents_attention, flex_attention):
        torch.testing.assert_close(attention(None, *given, None, documents=documents, softcap=0.5)[0], expected)
    with pytest.raises(ValueError, match="knows no soft-capping"):
        varlen_attention(None, *given, None, documents=documents, softcap=0.5, kernel=plain_varlen)


def test_a_layout_puts_a_shared_prompt_in_front_of_each_completion():
    found = layout(tuple(DOCUMENT_LISTS["shared"]), True, torch.device("cpu"))
    assert found.queries.tolist() == [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert found.keys.tolist() == [*range(8), *range(8, 12), *range(6), 12, 13, 14, 8, 9, *range(15, 20)]
    assert found.query_ends.tolist() == [0, 3, 6, 9, 14]
    assert found.key_ends.tolist() == [0, 8, 12, 21, 28]
    assert (found.longest_queries, found.longest_keys) == (5, 9)


def differentiable(query, key, value, places, scale, window):
    """As plain_varlen, fast enough for 300 tokens."""
    parts = []
    for number in range(len(places.query_ends) - 1):
        q0, q1 = places.query_ends[number : number + 2].tolist()
        k0, k1 = places.key_ends[number : number + 2].tolist()
        visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - q1 + q0)
        visible = visible if window is None else visible.triu(k1 - k0 - q1 + q0 - window + 1)
        q, k, v = (part.transpose(0, 1) for part in (query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(0, 1))
    return torch.cat(parts)


def test_a_kernel_is_used_when_it_agrees_and_refused_when_a_document_sees_another():
    net = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=1, intermediate_size=8))

    def right(*args, **kwargs):
        return varlen_attention(*args, **kwargs, kernel=differentiable)

    def one_document(*args, documents, **kwargs):
        whole = [Document(documents[0].start, documents[-1].end, read=documents[0].read)]
        return varlen_attention(*args, documents=whole, **kwargs, kernel=differentiable)

    def no_window(*args, sliding_window, **kwargs):
        return right(*args, **kwargs)

    def no_gradients(*args, **kwargs):
        out, nothing = right(*args, **kwargs)
        return out.detach().requires_grad_(), nothing

    cpu = torch.device("cpu")
    assert why_not(right, net, cpu, torch.float32) is None
    assert "differs from the loop" in why_not(one_document, net, cpu, torch.float32)
    assert "differs from the loop" in why_not(no_window, net, cpu, torch.float32)
    assert why_not(no_gradients, net, cpu, torch.float32) is not None
    assert fastest_attention(net, cpu, torch.bfloat16) == DOCUMENTS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_on_a_gpu(dtype):
    cuda = torch.device("cuda")
    sizes = SIZES | {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 8}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, head_dim=64, attn_logit_softcapping=20.0))
    assert why_not(kernels.KERNELS["varlen"], llama, cuda, dtype) is None
    assert why_not(kernels.KERNELS["flex"], llama, cuda, dtype) is None
    assert fastest_attention(gemma, cuda, dtype) == f"{DOCUMENTS}_flex"
