"""Proof that a folded model says what the unfolded one says: oracle, runners, judges.

The statement under test is equality in real arithmetic. A judge answers pass, fail or
inconclusive; what could not be computed never passes.
"""
