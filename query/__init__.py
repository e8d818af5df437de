"""What is asked: plan, cost, retrieve, rebuild, answer."""
