# Sourced by the scripts beside it: packages of any Debian suite, without touching this
# machine's own apt state. Sets nothing but functions.

# need COMMAND PACKAGE: installs the package if there is no such command.
need() {
    command -v "$1" >/dev/null 2>&1 || install_package "$2"
}

# install_package PACKAGE: installs it on this machine.
install_package() {
    echo "Installing $1 ..."
    [ "$(id -u)" = 0 ] || { echo "$1 is missing, and only root can install it" >&2; exit 1; }
    (
        flock 8 # several scripts may be at it
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$1" >/dev/null
    ) 8>/tmp/vmfleet-cpr-apt.lock
}

# debian_mirror: the address of the Debian archive that this machine's apt uses.
debian_mirror() {
    list='$(ORIGIN) $(LABEL) $(REPO_URI)'
    mirror=$(apt-get indextargets --format "$list" | awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }')
    if [ -z "$mirror" ]; then # the lists were never fetched, or were cleaned away
        apt-get update -qq >&2
        mirror=$(apt-get indextargets --format "$list" | awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }')
    fi
    [ -n "$mirror" ] || { echo "apt on this machine has no Debian archive configured" >&2; exit 1; }
    echo "$mirror"
}

# apt_download SUITE DIRECTORY PACKAGE...: the packages with all that they depend on, as .deb files.
apt_download() {
    apt_suite=$1 apt_directory=$2 apt_state=$2/apt
    shift 2
    mkdir -p "$apt_state/lists/partial" "$apt_state/archives/partial" "$apt_state/empty"
    : >"$apt_state/status"
    keyring=$(find /usr/share/keyrings -name 'debian-archive-keyring.[gp]*' | sort | head -n 1)
    mirror=$(debian_mirror)
    for apt_dist in "${apt_suite%-backports}" "$apt_suite"; do
        echo "deb [signed-by=$keyring] $mirror $apt_dist main"
    done | sort -u >"$apt_state/sources.list"
    again private_apt update
    again private_apt install --download-only --no-install-recommends -y -t "$apt_suite" "$@" >/dev/null
    mv "$apt_state/archives"/*.deb "$apt_directory"
    rm -rf "$apt_state"
}

# again COMMAND...: runs it, up to three times: a mirror may be out of order for a moment.
again() {
    "$@" || { sleep 5; "$@"; } || { sleep 20; "$@"; }
}

# bootstrap DIRECTORY PACKAGE,...: a Debian trixie with these packages; needs mmdebstrap in PATH.
bootstrap() {
    rm -rf "$1"
    keyring=$(find /usr/share/keyrings -name 'debian-archive-keyring.[gp]*' | sort | head -n 1)
    mmdebstrap --quiet --mode=root --variant=essential --format=directory --include="$2" \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
        --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        trixie "$1" "deb [signed-by=$keyring] $(debian_mirror) trixie main" </dev/null
}

# private_apt ARGUMENT...: apt-get with the state in $apt_state and nothing installed.
private_apt() {
    apt-get -qq -o Dir::State="$apt_state" -o Dir::State::lists="$apt_state/lists" \
        -o Dir::State::status="$apt_state/status" -o Dir::Cache="$apt_state" \
        -o Dir::Cache::archives="$apt_state/archives" -o Dir::Etc::SourceList="$apt_state/sources.list" \
        -o Dir::Etc::SourceParts="$apt_state/empty" -o Dir::Etc::PreferencesParts="$apt_state/empty" \
        -o Dir::Etc::Preferences=/dev/null -o APT::Sandbox::User=root -o Acquire::Languages=none \
        -o Acquire::Retries=3 "$@"
}
