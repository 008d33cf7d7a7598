"""One model in several processes: who keeps what of it, how they speak with each other, who starts and watches them."""
