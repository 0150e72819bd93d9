def convex(*a): raise NotImplementedError
