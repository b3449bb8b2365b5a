"""Shared fixtures: one thread (small models are slower with more), no hub, a home of our own."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton sees a kernel

import melinoe
from families import save_checkpoint
from melinoe.models.folder import resolve_model


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` run where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread(tmp_path_factory):
    torch.set_num_threads(1)
    os.environ["MELINOE_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory):
    """A tiny random OLMoE checkpoint in float32."""
    return save_checkpoint(tmp_path_factory.mktemp("olmoe") / "model", "olmoe")


@pytest.fixture(scope="session")
def olmoe_store(olmoe, tmp_path_factory):
    """Its store. Tests that break something copy it first."""
    target = tmp_path_factory.mktemp("olmoe-store") / "store"
    melinoe.convert(olmoe, target, progress=False)
    return target


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """The embedded model's store."""
    target = tmp_path_factory.mktemp("tiny-store") / "store"
    melinoe.convert(resolve_model("tiny"), target, progress=False)
    return target
