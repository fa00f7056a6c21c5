"""Broken on purpose: it needs a library that is not installed."""

from __future__ import annotations

import library_of_a_vendor_who_went_away as vendor

from loong_core import Backend, hookimpl


@hookimpl
def loong_backends() -> list[Backend]:
    """Never reached."""
    return [vendor.BACKEND]
