"""Words, codes, bags, head and loss against a slow NumPy reference, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cka_probe.distill.bags.codes import bags_of, new_words, squared_distances
from cka_probe.distill.bags.dynamic_head import DynamicHead
from cka_probe.distill.bags.prediction import BagPrediction
from cka_probe.distill.bags.vocabulary import Vocabulary
from cka_probe.errors import SpecError
from tests.distill import paper_oracles as papers

IMAGES, WORDS, WIDTH = 3, 9, 5
LEVELS = ((4, 6, 7), (6, 5, 5))  # (c, h, w)


def made(seed: int = 0) -> BagPrediction:
    torch.manual_seed(seed)
    return BagPrediction(
        [Vocabulary(WORDS, channels, sharpness=15, seed=seed) for channels, *_ in LEVELS],
        [DynamicHead(channels, WIDTH, kappa=8) for channels, *_ in LEVELS],
    )


def weights_of(head: DynamicHead, words: np.ndarray) -> np.ndarray:
    first, norm, _, second = head.layers
    parameters = (first.weight, norm.weight, norm.bias, second.weight, second.bias)
    a, gain, shift, b, bias = (value.detach().double().numpy() for value in parameters)
    return papers.dynamic_head(words, a, (gain, shift), (b, bias))


def places(step: int) -> list[float]:
    """The numbers from 0 to 1 that a step draws, from seed 0."""
    key = int(np.random.SeedSequence((0, step)).generate_state(1, np.uint64)[0])
    return torch.rand(IMAGES, generator=torch.Generator().manual_seed(key), dtype=torch.float64).tolist()


def test_ten_steps_are_those_of_the_reference() -> None:
    bags, generator = made(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(bags.parameters(), lr=0.1)
    states = [(vocabulary.words.double().numpy(), 0.5, 0) for vocabulary in bags.vocabularies]  # m̄ starts at 0.5
    for step in range(10):  # the queue of 9 words goes round three times
        maps = [torch.randn(IMAGES, *shape, generator=generator) for shape in LEVELS]
        crops, patches = (torch.randn(IMAGES * count, WIDTH, generator=generator) for count in (2, 5))
        drawn = places(step)
        targets, kinds, moved = [], ([], []), []
        for head, (words, mean, oldest), level in zip(bags.heads, states, maps, strict=True):
            array, (height, width) = level.double().numpy(), (level.shape[2] - 4, level.shape[3] - 4)
            weights = weights_of(head, words)  # the words before those of this step
            for kind, features, count in zip(kinds, (crops, patches), (2, 5), strict=True):
                of_crops = features.double().numpy().reshape(IMAGES, count, WIDTH)
                kind.append([papers.logits(of_crops[:, crop], weights, kappa=8) for crop in range(count)])
            mean = papers.update_mean_distance(array, words, mean)
            targets.append(papers.bags(papers.codes(array, words, mean, inverse_delta=15)))
            locations = [divmod(int(number * height * width), width) for number in drawn]
            moved.append((mean, papers.dictionary_update(words, papers.word_candidates(array, locations), oldest)))
        expected = [papers.loss([kind], targets) for kind in kinds]
        states = [(words, mean, oldest) for mean, (words, oldest) in moved]
        losses = bags([crops, patches], maps)
        # float32 against float64, through a softmax of distances of about 10 times 15.
        assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-4)
        for vocabulary, (words, mean, oldest) in zip(bags.vocabularies, states, strict=True):
            np.testing.assert_allclose(vocabulary.words.numpy(), words, atol=1e-6)
            assert float(vocabulary.mean_distance) == pytest.approx(mean, rel=1e-5)
            assert vocabulary.pointer == oldest
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()


def test_bags_are_distributions_and_a_word_is_its_own_code() -> None:
    words = 10 * torch.eye(4)
    maps = words[:2].reshape(2, 4, 1, 1).expand(2, 4, 3, 3)
    bags = bags_of(squared_distances(maps, words), torch.tensor(15.0))
    torch.testing.assert_close(bags, torch.eye(4)[:2])
    bags = bags_of(torch.rand(21, 7, 9), torch.tensor(3.0))  # more than are computed together
    torch.testing.assert_close(bags.sum(1), torch.ones(21))
    assert bool((bags >= 0).all())


def test_a_window_next_to_the_end_of_the_range_is_the_last_one() -> None:
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert new_words(maps, torch.tensor([0.0])).item() == 5
    assert new_words(maps, torch.tensor([1 - 1e-12])).item() == 10


def test_the_state_of_a_vocabulary_goes_on_where_it_was() -> None:
    maps = torch.randn(6, IMAGES, 4, 6, 6)
    one, other = (Vocabulary(WORDS, 4, sharpness=15, seed=3) for _ in range(2))
    for batch in maps[:2]:
        one(batch)
    other.load_state_dict(one.state_dict())
    for batch in maps[2:]:
        assert torch.equal(one(batch), other(batch))
    assert torch.equal(one.words, other.words)


def test_in_evaluation_nothing_of_a_vocabulary_moves() -> None:
    vocabulary = Vocabulary(WORDS, 4, sharpness=15, seed=0).eval()
    before = {name: value.clone() for name, value in vocabulary.named_buffers()}
    vocabulary(torch.randn(2, 4, 6, 6))  # 2 is no divisor of 9
    assert all(torch.equal(value, before[name]) for name, value in vocabulary.named_buffers())
    assert (vocabulary.pointer, vocabulary.batches) == (0, 0)


def test_words_that_are_no_multiple_of_the_batch_are_refused() -> None:
    with pytest.raises(SpecError, match="multiple of the 4 images of a step on all processes, but is 9. Give 8"):
        Vocabulary(WORDS, 4, sharpness=15, seed=0)(torch.randn(4, 4, 6, 6))


def test_autocast_changes_neither_bags_nor_words() -> None:
    maps, features = [torch.randn(IMAGES, *shape) for shape in LEVELS], torch.randn(IMAGES, WIDTH)
    one, other = made(), made()
    plain = one([features], maps)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = other([features], maps)
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(one.vocabularies[0].words, other.vocabularies[0].words)
