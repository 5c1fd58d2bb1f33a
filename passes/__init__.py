"""Graph passes: Policy to Policy, one file each. Imported as vlac.passes."""
