"""Who is measured: how each is installed and started. What runs then is in bench/workers/."""
