#compdef ww
# ww completion for zsh
_ww_completion() {
    local -a plain described response
    local value
    response=("${(@f)$(COMP_WORDS="${(F)words}" COMP_CWORD=$((CURRENT-1)) \
        _WW_COMPLETE=complete_words ww 2>/dev/null)}")
    for value in "${response[@]}"; do
        if [[ $value == *$'\t'* ]]; then
            described+=("${${value%%$'\t'*}//:/\\:}:${value#*$'\t'}")
        elif [[ -n $value ]]; then
            plain+=("$value")
        fi
    done
    if (( $#described )); then
        _describe -V unsorted described -U
    fi
    if (( $#plain )); then
        compadd -U -V unsorted -a plain
    fi
    if (( ! $#described && ! $#plain )); then
        _files
    fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _ww_completion "$@"
else
    compdef _ww_completion ww
fi
