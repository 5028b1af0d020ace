"""The codebook's builder and its files."""

from __future__ import annotations

import pytest
import torch

from fsr_vllm.methods import prototypes, prune
from fsr_vllm.methods.prototypes import (
    build_prototypes,
    dpc_knn,
    load_prototypes,
    redundant_tokens,
    save_prototypes,
)


def blobs(centres, per, noise=0.02, seed=0):
    """`per` points around each centre, and which centre each belongs to."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.arange(len(centres)).repeat_interleave(per)
    return centres[owner] + noise * torch.randn(len(owner), centres.shape[1], generator=g), owner


def test_clusters_are_found(monkeypatch):
    points, owner = blobs(torch.eye(5)[:4], 12)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))
    labels = dpc_knn(points[order], 4)
    assert torch.equal(labels[:, None] == labels, owner[order][:, None] == owner[order])
    monkeypatch.setattr(prototypes, "_BLOCK", 7)
    assert torch.equal(dpc_knn(points[order], 4), labels)  # whatever the size of blocks
    assert (
        dpc_knn(points[:1], 3).tolist() == [0] and len(dpc_knn(torch.ones(4, 2), 9).unique()) == 4
    )


def test_prototypes_are_what_many_images_share():
    common, rare = torch.eye(6)[:2], torch.eye(6)[2:3]
    images = [blobs(common if i else torch.cat([common, rare]), 5, seed=i)[0] for i in range(6)]
    images.append(torch.empty(0, 6))  # an image without redundant tokens
    book = build_prototypes(images, clusters_per_image=3, clusters=3, min_images=4)
    assert book.shape == (2, 6)
    torch.testing.assert_close(book.norm(dim=1), torch.ones(2))
    assert (
        sorted((book @ common.T).argmax(1).tolist()) == [0, 1]
        and (book @ common.T).amax(1).min() > 0.99
    )
    kept = prune(torch.eye(6), prototypes=book, budget=4, method="codebook").indices
    assert kept.tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="no cluster draws on min_images = 7 images"):
        build_prototypes(images, clusters_per_image=3, clusters=3, min_images=7)
    with pytest.raises(ValueError, match="no cluster"):
        build_prototypes([])


def test_small_clusters_are_dropped():
    images = [
        torch.cat([blobs(torch.eye(4)[:1], 6, seed=i)[0], torch.eye(4)[3:]]) for i in range(3)
    ]
    assert (
        len(build_prototypes(images, clusters_per_image=2, clusters=2, min_images=3, min_tokens=1))
        == 2
    )
    assert (
        len(build_prototypes(images, clusters_per_image=2, clusters=2, min_images=1, min_tokens=2))
        <= 2
    )
    only = build_prototypes(images, clusters_per_image=2, clusters=1, min_images=3, min_tokens=2)
    assert len(only) == 1 and only[0, 0] > 0.99


def test_which_tokens_are_redundant():
    probability = torch.tensor([0.1, 0.2, 0.1, 0.1])
    context, everywhere = (
        torch.tensor([0.0, 0.0, 3e-3, 0.0]),
        torch.tensor([1e-4, 0.0, 0.0, 1.3e-4]),
    )
    assert redundant_tokens(probability, context, everywhere).tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert redundant_tokens(probability, context, everywhere, max_divergence=1.0).tolist() == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("name", ["book.pt", "book.pth", "book.safetensors"])
def test_files(tmp_path, name):
    book = torch.randn(5, 3).half()
    save_prototypes(book.T.contiguous().T, tmp_path / name)
    assert torch.equal(load_prototypes(tmp_path / name), book)
    assert torch.equal(load_prototypes(str(tmp_path / name)), book)


def test_files_of_others_and_of_no_use(tmp_path):
    torch.save(torch.ones(2, 3), tmp_path / "bare.pt")
    torch.save({"anything": torch.ones(2, 3)}, tmp_path / "one.pt")
    assert torch.equal(load_prototypes(tmp_path / "bare.pt"), load_prototypes(tmp_path / "one.pt"))
    for content in (
        {"a": torch.ones(2, 3), "b": torch.ones(2, 3)},
        torch.ones(3),
        torch.ones(2, 3, dtype=torch.int64),
        7,
    ):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match="must be one floating-point tensor"):
            load_prototypes(tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="must be one floating-point tensor"):
        save_prototypes(torch.ones(3), tmp_path / "book.pt")
    for act in (load_prototypes, lambda path: save_prototypes(torch.ones(2, 3), path)):
        with pytest.raises(ValueError, match=".pt or .safetensors files"):
            act(tmp_path / "book.npz")
