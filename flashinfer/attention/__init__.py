"""Attention operators. Their public modules are flashinfer.decode, flashinfer.prefill, flashinfer.cascade, …"""
