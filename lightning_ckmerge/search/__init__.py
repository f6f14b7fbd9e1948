"""Ask and tell, anchors, staged evaluation, verdict. Sees only a function from coefficients to scores."""
