"""From a network to its channels and back: trace, slim, mask, save and load."""

from edgeprune.graph.channels import Activation, ChannelGraph, ChannelGroup, Member, Op

__all__ = ["Activation", "ChannelGraph", "ChannelGroup", "Member", "Op"]
