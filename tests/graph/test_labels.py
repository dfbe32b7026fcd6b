from __future__ import annotations

import torch

from edgeprune.graph.labels import NEUTRAL, Labels, compact, core, counted, varies


def test_single_positions_are_neutral_and_tie_nothing() -> None:
    book = Labels()
    a, b = book.fresh(3), book.fresh(3)
    assert book.fresh(1).tolist() == [NEUTRAL]
    book.tie(a, torch.zeros(1, dtype=torch.long))
    book.tie(b, torch.zeros(1, dtype=torch.long))
    classes, reasons = book.resolve()
    assert len({int(classes[i]) for i in [*a.tolist(), *b.tolist()]}) == 6
    assert reasons == {int(classes[NEUTRAL]): "single position"}


def test_ties_are_transitive_and_broadcast() -> None:
    book = Labels()
    a, b, c = book.fresh(2), book.fresh(2), book.fresh(4)
    book.tie(a.view(1, 2, 1).expand(1, 2, 5), b.view(2, 1))
    book.tie(c.view(2, 2), b)
    classes, _ = book.resolve()
    assert classes[a[0]] == classes[b[0]] == classes[c[0]] == classes[c[2]]
    assert classes[a[1]] == classes[b[1]] == classes[c[1]] == classes[c[3]]
    assert classes[a[0]] != classes[a[1]]


def test_large_ties_are_the_same_as_small_ones() -> None:
    book = Labels()
    a, b = book.fresh(2), book.fresh(10_000)
    book.tie(a.repeat(5_000), b)
    classes, _ = book.resolve()
    assert (classes[b.numpy()][::2] == classes[a[0]]).all()
    assert (classes[b.numpy()][1::2] == classes[a[1]]).all()


def test_ties_of_several_pieces_are_the_same_as_small_ones() -> None:
    book = Labels()
    a, b = book.fresh(3), book.fresh(2**20 + 3)
    book.tie(a[:1].expand(len(b) - 2), b[2:])
    classes, _ = book.resolve()
    assert (classes[b.numpy()][2:] == classes[a[0]]).all()
    assert len(set(classes[[*a.tolist(), *b[:2].tolist()]].tolist())) == 5


def test_labels_are_counted() -> None:
    found, counts = counted(torch.tensor([7, 2, 7, 7, 0]))
    assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == {0: 1, 2: 1, 7: 3}


def test_the_first_reason_given_is_the_one_reported() -> None:
    book = Labels()
    a = book.fresh(2)
    book.freeze(a[:1], "first")
    book.freeze(a, "second")
    classes, reasons = book.resolve()
    assert reasons[int(classes[a[0]])] == "first"
    assert reasons[int(classes[a[1]])] == "first", "the second freeze tied both channels"


def test_core_drops_what_does_not_vary_and_counts_it() -> None:
    labels = torch.arange(1, 4).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    flat, repeat = core(labels)
    assert (flat.tolist(), repeat) == ([1, 2, 3], 20)
    assert [varies(labels, d) for d in range(4)] == [False, True, False, False]
    assert core(torch.zeros(0, 3, dtype=torch.long))[1] == 1


def test_compact_finds_repeated_labels_in_a_copy() -> None:
    copied = torch.arange(1, 4).view(3, 1).expand(3, 4).clone()
    assert varies(copied, 1)
    again = compact(copied)
    assert not varies(again, 1)
    assert torch.equal(again, copied)


def test_balanced_parts_keep_as_many_and_tie_as_little_as_they_can() -> None:
    book = Labels()
    left, right = book.fresh(3), book.fresh(3)
    book.balance([left, right])
    classes, _ = book.resolve()
    assert len(set(classes[left.numpy()].tolist())) == 3, "one of the left goes with one of the right"
    assert set(classes[left.numpy()].tolist()) == set(classes[right.numpy()].tolist())


def test_what_is_balanced_already_is_left_alone() -> None:
    book = Labels()
    mixed = book.fresh(4)
    book.tie(mixed[:2], mixed[[3, 2]])
    book.balance([mixed[:2], mixed[2:]])
    classes, _ = book.resolve()
    assert classes[mixed[0]] == classes[mixed[3]] != classes[mixed[1]] == classes[mixed[2]]


def test_surpluses_that_do_not_cancel_pairwise_cancel_in_runs() -> None:
    book = Labels()
    left, right = book.fresh(4), book.fresh(4)
    book.tie(left[:2], left[:1])  # a class of two, against four classes of one
    book.balance([left, right])
    classes, reasons = book.resolve()
    for one in set(classes[left.numpy()].tolist()):
        assert (classes[left.numpy()] == one).sum() == (classes[right.numpy()] == one).sum()
        assert one not in reasons


def test_what_cannot_be_balanced_stays() -> None:
    book = Labels()
    left, right = book.fresh(2), book.fresh(2)
    book.freeze(right, "said so")
    book.balance([left, right])
    classes, reasons = book.resolve()
    assert {reasons[int(c)] for c in classes[left.numpy()]} <= {"said so", "single position"}


def test_nothing_meets_where_there_is_nothing() -> None:
    book = Labels()
    a, b = book.fresh(3), book.fresh(3)
    book.tie(a.expand(0, 3), b.expand(0, 3))
    book.freeze(a.expand(0, 3), "empty")
    classes, reasons = book.resolve()
    assert len(set(classes[a.tolist() + b.tolist()].tolist())) == 6 and "empty" not in [reasons.get(int(c)) for c in classes[a.numpy()]]
