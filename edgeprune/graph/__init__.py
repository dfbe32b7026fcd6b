"""From a network to its channels and back: trace, slim, mask, prove, save and load. This file imports no torch."""

from edgeprune.graph.channels import Activation, ChannelGraph, ChannelGroup, Member, Mixing, Op, Read, Tap

__all__ = ["Activation", "ChannelGraph", "ChannelGroup", "Member", "Mixing", "Op", "Read", "Tap"]
