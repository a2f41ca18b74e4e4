"""Fixtures of the methods' tests."""

import pytest

from ras_fast.methods import moras


@pytest.fixture
def every_answer_refuses(monkeypatch):
    monkeypatch.setattr(moras, "is_refusal", lambda text: True)
