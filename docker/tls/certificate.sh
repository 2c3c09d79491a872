#!/bin/sh
# A certificate for trying mTLS: of an authority made at the first call, both in the directory DIR.
#
#   sh docker/tls/certificate.sh DIR NAME SAN     DIR/ca.pem, DIR/NAME.pem, DIR/NAME.key
#
# SAN is what the certificate is called: "DNS:localhost,IP:127.0.0.1" for a daemon, which clients compare with
# the address; "DNS:engine-a.example.com" or "URI:spiffe://example.com/engine-a" for a client, which the daemon
# looks up in [tls]. For production use an authority that you have: cert-manager, Vault, SPIRE.
set -eu
dir=$1 name=$2 san=$3
days=30
umask 077
mkdir -p "$dir"
if [ ! -e "$dir/ca.key" ]; then
    openssl req -x509 -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 \
        -keyout "$dir/ca.key" -out "$dir/ca.pem" -days "$days" -subj "/CN=kvtier test authority" \
        -addext "keyUsage=critical,keyCertSign,cRLSign"
fi
openssl req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 \
    -keyout "$dir/$name.key" -out "$dir/$name.csr" -subj "/CN=$name"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$san" > "$dir/$name.ext"
openssl x509 -req -in "$dir/$name.csr" -CA "$dir/ca.pem" -CAkey "$dir/ca.key" -CAcreateserial \
    -days "$days" -extfile "$dir/$name.ext" -out "$dir/$name.pem"
rm "$dir/$name.csr" "$dir/$name.ext"
