#!/bin/sh
# Runs inside a booted container: the install steps of systemd/README.md on the
# demo's tokens and trust files, then the service's life. Lines that begin with
# "CHECK " are read by TestSystemdBoot.
set -u
systemd-sysusers
install -d -m 0755 /etc/chancery /etc/chancery/trust
cp -r /srv/demo/trust/. /etc/chancery/trust/
chmod -R a+rX /etc/chancery/trust
install -d -m 0750 -o root -g chancery /etc/chancery/tls
install -m 0400 -o chancery -g chancery /srv/demo/tls/server.key /etc/chancery/tls/server.key
install -m 0644 /srv/demo/tls/server.pem /etc/chancery/tls/server.pem
install -d -m 0700 /etc/chancery/credentials
install -m 0400 /srv/demo/pins/online /etc/chancery/credentials/hsm-pin
runuser -u chancery -- install -d -m 0700 /var/lib/chancery || install -d -m 0700 -o chancery -g chancery /var/lib/chancery
# Practice tokens are files: they have to be where the unit may write.
cp -r /srv/demo/tokens /var/lib/chancery/tokens
sed -i 's#^directories.tokendir.*#directories.tokendir = /var/lib/chancery/tokens/tokens#' /var/lib/chancery/tokens/softhsm2.conf
chown -R chancery:chancery /var/lib/chancery
ip link set lo up

echo "CHECK init $(runuser -u chancery -- chancery init --config /etc/chancery/chancery.yaml >/dev/null; echo $?)"
systemctl daemon-reload
systemctl start chancery
echo "CHECK start $?"
echo "CHECK readyz $(curl -sS --cacert /srv/demo/tls-ca.pem https://127.0.0.1/readyz)"
echo "CHECK user $(ps -o user= -C chancery)"
echo "CHECK pin in environment $(grep -c "$(cat /srv/demo/pins/online)" /proc/$(pidof chancery)/environ)"
before=$(pidof chancery)
systemctl kill --signal=SIGKILL chancery
for _ in $(seq 600); do
    now=$(pidof chancery)
    [ -n "$now" ] && [ "$now" != "$before" ] && curl -sf --cacert /srv/demo/tls-ca.pem https://127.0.0.1/readyz >/dev/null && break
    sleep 0.5
done
echo "CHECK after a kill $(curl -sS --cacert /srv/demo/tls-ca.pem https://127.0.0.1/readyz)"
systemctl stop chancery
echo "CHECK stop $(systemctl show chancery -p Result --value)"
echo 0000 >/etc/chancery/credentials/hsm-pin
systemctl start chancery
# With a restart to come the state would be auto-restart.
echo "CHECK wrong PIN $(systemctl show chancery -p ExecMainStatus --value) $(systemctl show chancery -p SubState --value) restarts $(systemctl show chancery -p NRestarts --value)"
journalctl -u chancery --no-pager
