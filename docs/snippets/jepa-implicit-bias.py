from attnlib.theory import jepa

for depth in (1, 2, 3):
    times = [jepa.time_to(lam=1.0, var=1 / rho, depth=depth) for rho in (1.2, 0.8)]
    print(depth, [round(t, 2) for t in times], jepa.plateau(1.0, 1 / 1.2, depth))
