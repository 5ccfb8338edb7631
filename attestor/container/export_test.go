package container

import "time"

// Age makes all that is known of containers look as if it was asked for so much earlier.
func (d *Docker) Age(by time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range d.known {
		f := *k.facts()
		f.asked = f.asked.Add(-by)
		k.set(&f)
	}
}

// Known is how many containers are kept.
func (d *Docker) Known() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.known)
}
