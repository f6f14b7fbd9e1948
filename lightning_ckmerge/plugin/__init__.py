"""The only room that imports Lightning: the callback, the evaluation inside ``fit``, the strategies."""
