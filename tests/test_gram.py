"""Activation statistics of linears: Grams against the plain formula."""

import torch
from torch import Tensor, nn

from subbit.calibration.gram import GramCollector, clip_token_norms


def collected(width: int, calls: list[Tensor], clip_norm: float) -> GramCollector:
    linears = {"q_proj": nn.Linear(width, 8), "k_proj": nn.Linear(width, 8), "o_proj": nn.Linear(8, 4)}
    with torch.no_grad(), GramCollector(linears, clip_norm) as grams:
        for tokens in calls:
            linears["o_proj"](linears["q_proj"](tokens) + linears["k_proj"](tokens))
    return grams


def test_grams_are_those_of_the_formula_whatever_the_width() -> None:
    """1000 columns are two whole blocks and a part of one."""
    generator = torch.Generator().manual_seed(0)
    for width in (3, 384, 1000):
        calls = [torch.randn(2, tokens, width, generator=generator) for tokens in (5, 50, 7)]
        grams = collected(width, calls, clip_norm=0)
        tokens = torch.cat([call.flatten(0, 1) for call in calls])
        gram = grams.gram("q_proj")
        torch.testing.assert_close(gram, tokens.T @ tokens / len(tokens))
        assert torch.equal(gram, gram.T)
        assert grams.shared() == {"q_proj": ["q_proj", "k_proj"], "o_proj": ["o_proj"]}
        assert grams.tokens("q_proj") == len(tokens) == 124


def test_long_tokens_count_as_a_multiple_of_the_median() -> None:
    tokens = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    tokens[0, 4] *= 1000
    median = tokens[0].norm(dim=1).median()
    clipped = clip_token_norms(tokens[0], 2.0)
    torch.testing.assert_close(clipped[4].norm(), 2 * median)
    torch.testing.assert_close(clipped[:4], tokens[0, :4])
    torch.testing.assert_close(collected(16, [tokens], 2.0).gram("q_proj"), clipped.T @ clipped / 9)
