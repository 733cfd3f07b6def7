"""Datasets, and batches that are a function of (seed, epoch, number) alone."""

import numpy as np
import pytest
import torch
from qtrain.data import TensorSplit, batch_count, eval_batches, load_dataset, train_batches
from qtrain.seeds import generator, seed_globals, stream_seed
from qtrain.shapes import SHAPES, shapes


def same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    pairs = [ab for one in zip(left, right, strict=True) for ab in zip(*one, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def numbered(count):
    """A split whose examples carry their own index."""
    return TensorSplit(torch.arange(count)[:, None].float(), torch.arange(count))


def test_stream_seed_is_fixed():
    # a changed value would make old runs resume with other numbers
    assert stream_seed(0, 0, "order") == 6966386321333152537
    assert stream_seed(7, 123, "model/0") == 2611054561877199955
    seeds = {stream_seed(s, t, n) for s in range(4) for t in range(4) for n in ("order", "init")}
    assert len(seeds) == 32


def test_streams_do_not_depend_on_earlier_draws():
    seed_globals(1, 2, "model/0")
    first = torch.rand(3), np.random.rand(3)
    torch.rand(100)
    seed_globals(1, 2, "model/0")
    assert torch.equal(torch.rand(3), first[0])
    assert np.array_equal(np.random.rand(3), first[1])
    assert not torch.equal(
        torch.rand(3, generator=generator(1, 2, "a")), torch.rand(3, generator=generator(1, 3, "a"))
    )


def test_digits_split():
    data, again = load_dataset("digits"), load_dataset("digits")
    assert (len(data.train), len(data.test)) == (1297, 500)
    assert torch.equal(data.train.x, again.train.x) and torch.equal(data.test.y, again.test.y)
    counts = data.test.y.bincount()
    assert counts.min() >= 45 and counts.max() <= 55
    assert abs(data.train.x.mean()) < 1e-5 and abs(data.train.x.std() - 1) < 1e-5
    train_rows = {row.numpy().tobytes() for row in data.train.x}
    shared = sum(row.numpy().tobytes() in train_rows for row in data.test.x)
    assert shared == 0


def test_batches_resume_inside_an_epoch():
    split = numbered(103)
    whole = list(train_batches(split, 10, seed=3, epoch=4))
    assert len(whole) == batch_count(split, 10) == 10
    assert same(train_batches(split, 10, seed=3, epoch=4, start=6), whole[6:])
    seen = torch.cat([y for _, y in whole])
    assert len(set(seen.tolist())) == 100
    other = torch.cat([y for _, y in train_batches(split, 10, seed=3, epoch=5)])
    assert not torch.equal(seen, other)


def test_ranks_share_a_batch():
    split = numbered(40)
    whole = list(train_batches(split, 8, seed=0, epoch=0))
    parts = [list(train_batches(split, 8, seed=0, epoch=0, rank=r, world=2)) for r in (0, 1)]
    for (_, y), (_, first), (_, second) in zip(whole, *parts, strict=True):
        assert torch.equal(y, torch.stack([first, second], 1).flatten())


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_reads_everything_once(world):
    ys = [y for r in range(world) for _, y in eval_batches(numbered(50), 7, rank=r, world=world)]
    assert sorted(torch.cat(ys).tolist()) == list(range(50))


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match=r"data: batch_size must be at most the 5 .*got 6"):
        list(train_batches(numbered(5), 6, seed=0, epoch=0))


def test_shapes_are_a_function_of_the_index():
    x, y = shapes(0, 40, difficulty=0.7, seed=5)
    part, labels = shapes(25, 10, difficulty=0.7, seed=5)
    assert np.array_equal(part, x[25:35]) and np.array_equal(labels, y[25:35])
    assert not np.array_equal(part, shapes(25, 10, difficulty=0.7, seed=6)[0])
    assert x.dtype == np.float32 and x.shape == (40, 3, 32, 32)
    assert set(y.tolist()) == set(range(len(SHAPES)))


def test_shapes_get_harder():
    """Nearest class mean finds most easy pictures and few hard ones."""

    def accuracy(difficulty):
        x, y = shapes(0, 600, difficulty=difficulty)
        means = np.stack([x[:400][y[:400] == k].mean(0) for k in range(10)])
        distance = ((x[400:, None] - means[None]) ** 2).sum((2, 3, 4))
        return (distance.argmin(1) == y[400:]).mean()

    easy, hard = accuracy(0.0), accuracy(0.9)
    assert easy > 0.7 and hard < 0.5


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("mnist", {}, ValueError, "digits, shapes, cifar10, cifar100, imagefolder, got 'mnist'"),
        ("digits", {"size": 3}, ValueError, "data: options must be known to digits.*size"),
        ("shapes", {"classes": 11}, ValueError, "shapes: classes must be in 2..10, got 11"),
        ("shapes", {"difficulty": 2}, ValueError, "shapes: difficulty must be in .*got 2"),
        ("shapes", {"test_size": 0}, ValueError, "data: train_size and test_size must be posi"),
        ("cifar10", {}, FileNotFoundError, "cifar-10-batches-py .*cifar-10-python.tar.gz"),
        ("cifar100", {}, FileNotFoundError, "cifar-100-python"),
        ("imagefolder", {}, FileNotFoundError, "train/<class>"),
    ],
)
def test_bad_names_and_missing_files(name, options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        load_dataset(name, options)
    assert not list(tmp_path.iterdir())


def test_imagefolder_augments_by_index(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = noise.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{number}.png")
    data = load_dataset("imagefolder", {"root": str(tmp_path), "size": 16})
    assert data.classes == 2 and len(data.train) == 8
    order = {"seed": 0, "epoch": 1}
    whole = list(train_batches(data.train, 4, **order))
    assert whole[0][0].shape == (4, 3, 16, 16)
    torch.rand(7)
    assert same(train_batches(data.train, 4, **order, workers=1), whole)
    assert same(train_batches(data.train, 4, **order, start=1), whole[1:])
    # another epoch augments the same picture in another way
    ((later, _),) = train_batches(data.train, 8, seed=0, epoch=2)
    assert not any(torch.equal(picture, x) for picture in later for x in whole[0][0])
