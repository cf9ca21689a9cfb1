# The pins of a lock file for the distributions of `wanted`, with their hashes:
#   awk -v wanted="cheroot urllib3" -f pins.awk requirements-dev.lock
# One lock file is enough so, and the image has what the tests ran with.
BEGIN {
    count = split(wanted, names, /[ \\]+/)
    for (place = 1; place <= count; place++) if (names[place] != "") missing[names[place]] = 1
}
/^[a-z0-9]/ {
    split($1, pin, "==")
    keep = pin[1] in missing
    delete missing[pin[1]]
}
keep
END {
    for (name in missing) { print "pins.awk: no pin of " name >"/dev/stderr"; status = 1 }
    exit status
}
