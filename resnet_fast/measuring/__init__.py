# SPDX-License-Identifier: Apache-2.0
"""How times are taken, for every command that takes any.

clock.py reads the time and the memory of the host and of a GPU; rounds.py numbers the rounds, and
has a timer for kernels; steadiness.py turns rounds into a `Timing` and says whether it may be taken
as a fact; protocol.py checks answers before it times them; machine.py describes the machine;
peers.py lists the ways to run a ResNet that are measured.
"""
