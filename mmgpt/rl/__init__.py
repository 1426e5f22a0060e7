"""Reinforcement learning from human feedback: pure functions, and rollouts with the policy in the loop.

Letters in shapes: N answers, T tokens of the longest of them, V vocabulary, K answers to one prompt. A mask [N, T] is True on the
tokens that the policy chose, its end token included; answers begin in column 0, and padding stands behind them.
"""
