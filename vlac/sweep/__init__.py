"""Many artifacts compiled and measured: grids (`vlac sweep`), and a recipe with each pass removed (ablation)."""
