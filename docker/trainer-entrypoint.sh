# `retool "$@"`, with the sandbox's token from the container's secret: a recipe names only the variable.
if [ -r /run/secrets/sandbox_token ]; then
    RETOOL_SANDBOX_TOKEN=$(cat /run/secrets/sandbox_token)
    export RETOOL_SANDBOX_TOKEN
fi
exec retool "$@"
