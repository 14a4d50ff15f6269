"""Maintain a bank: find damage, unfinished units, leftovers and differences; merge, migrate."""
