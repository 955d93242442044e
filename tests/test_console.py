"""What is printed for people."""

from __future__ import annotations

from fluxq.console import plural


def test_a_count_has_its_noun_in_the_right_number():
    assert [plural(n, "image") for n in (0, 1, 2, 3000)] == ["0 images", "1 image", "2 images", "3,000 images"]
