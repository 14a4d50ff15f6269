"""The model: grids, frozen tower, LAPE, projector, masks, frame-causal loss. Imports none of ours."""
