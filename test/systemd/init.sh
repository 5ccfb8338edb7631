# init.sh UNITS V1 V2: becomes systemd, as PID 1 of the namespaces that it was
# started in, with these units and none of the machine's. V1 and V2 are where
# the hierarchies are mounted; V1 may be empty.
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/lib
umount -R /sys/fs/cgroup 2>/dev/null || true
if [ "$3" != /sys/fs/cgroup ]; then
	mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
	mkdir -p "$2" "$3"
	mount -t cgroup -o none,name=systemd cgroup "$2"
fi
mount -t cgroup2 cgroup2 "$3"
exec env -i container=test PATH="$PATH" SYSTEMD_UNIT_PATH="$1" \
	/lib/systemd/systemd --system --unit=up.target --log-target=console --show-status=0
