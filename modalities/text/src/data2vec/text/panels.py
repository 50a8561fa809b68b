"""The report's pictures of text: what the student sees, and which texts the teacher finds alike."""

from __future__ import annotations
